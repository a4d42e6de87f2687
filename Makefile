# `make demo` and `make test` set everything up by themselves, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:  ## What there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/'

setup: $(VENV)/.complete  ## Make .venv with pinned versions, torch first

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "torchorbax needs Python 3.11 or later; run: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm  # its torchvision exists for some builds of torch only
	touch $@

demo: setup  ## Train, kill, resume on other chips, compare
	$(BIN)/python examples/demo.py

test: setup  ## All tests
	$(BIN)/python -m pytest -n 2

lint: setup  ## Formatter, linter and type checker, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## Format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## Measure beside raw Orbax and torch, and write docs/performance.md; takes the machine for an hour
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks
	$(BIN)/python -m scripts.scaling --write

clean:  ## Remove what was set up and built
	rm -rf $(VENV) build dist *.egg-info runs
