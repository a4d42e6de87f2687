"""The processes of a run, and the coordination service that they agree through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torchorbax._src.distributed.processes import Processes
from torchorbax.errors import ConfigError

from tests.helpers.coordination import FakeService, contract
from tests.helpers.several import RunProcesses


def test_the_service_of_these_tests_answers_like_that_of_jax(run_processes: RunProcesses) -> None:
    program = """
        from tests.helpers.coordination import contract
        tell(json.dumps(contract(service)))
    """
    (real,) = run_processes(program, processes=1, devices=1)
    assert json.loads(real.stdout) == contract(FakeService())


def test_several_processes_without_a_service_are_told_so() -> None:
    with pytest.raises(ConfigError, match=r"2 processes without jax.distributed.initialize\(\) cannot agree"):
        Processes(1.0, None, 0, 2)


@pytest.mark.parametrize("timeout_s", [0, -1, True, "5", None, float("nan")])
def test_a_timeout_is_a_positive_number(timeout_s: Any) -> None:
    with pytest.raises(ConfigError, match="barrier_timeout_s must be a positive number of seconds"):
        Processes(timeout_s, None, 0, 1)
