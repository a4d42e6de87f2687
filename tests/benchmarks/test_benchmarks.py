"""The benchmarks run on tiny sizes, and the page shows what was measured. No time is judged here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks import report
from tests.helpers.programs import RunPython

ROOT = Path(__file__).parents[2]


def case(run_python: RunPython, folder: Path, name: str, devices: int = 8, **options: object) -> dict[str, list[float]]:
    code = "import runpy, sys; sys.argv[0] = 'cases'; runpy.run_module('benchmarks.cases', run_name='__main__')"
    env = {"PYTHONPATH": str(ROOT)}
    done = run_python(code, name, json.dumps(options), folder, devices=devices, warnings="ignore", env=env)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert found
    assert all(math.isfinite(value) and value >= 0 for values in found.values() for value in values)
    return found


def keys_of(name: str) -> set[str]:
    rows = [row for row in report.ROWS if row.case == name]
    return {key for row in rows for key in (row.ours, row.theirs) if key is not None}


def test_saves_and_restores(run_python: RunPython, tmp_path: Path) -> None:
    size = {"leaves": 3, "leaf_bytes": 1 << 16, "repeats": 1}
    saved = case(run_python, tmp_path, "save", **size, with_torch=True)
    assert keys_of("save") | keys_of("save_small") <= saved.keys()
    restored = case(run_python, tmp_path, "restore", devices=16, **size)
    assert keys_of("restore") | keys_of("restore_small") <= restored.keys()
    used = case(run_python, tmp_path, "memory", leaves=3, leaf_bytes=1 << 16, peer="ours", restoring=True)
    assert used.keys() < keys_of("memory_restore")


def test_loops_and_calls(run_python: RunPython, tmp_path: Path) -> None:
    done = case(run_python, tmp_path, "loop", leaves=2, leaf_bytes=1 << 16, repeats=1, step_s=0.001, seconds=0.05)
    assert keys_of("loop") <= done.keys()
    assert keys_of("skipped") <= case(run_python, tmp_path / "skipped", "skipped", repeats=1, calls=5).keys()
    assert keys_of("adapter") <= case(run_python, tmp_path, "adapter", repeats=1, tensors=5).keys()
    stepped = case(run_python, tmp_path, "step", repeats=1, parameters=2, calls=2)
    assert keys_of("step") | keys_of("step_alone") <= stepped.keys()


def test_comes_back_from_a_kill(run_python: RunPython, tmp_path: Path) -> None:
    assert keys_of("back") <= case(run_python, tmp_path, "back", repeats=1, layers=1).keys()


def test_the_accelerator_script_runs_on_the_cpu(run_python: RunPython, tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv[0] = 'it'; runpy.run_module('benchmarks.accelerator', run_name='__main__')"
    options = ("--gb", 0.001, "--repeats", 1, "--seconds", 0.1, "--folder", tmp_path, "--out", tmp_path / "out.json")
    done = run_python(code, *options, devices=1, warnings="ignore", env={"PYTHONPATH": str(ROOT)})
    assert "| 0.001 GB |" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["device"] == "cpu"


def test_the_page_shows_the_committed_results() -> None:
    content = json.loads(runner.RESULTS.read_text())
    page = runner.PAGE.read_text()
    assert report.filled(page, report.sections(content)) == page, "run: python -m benchmarks"
    assert all(not math.isnan(row.ratio(content["table"])) for row in report.ROWS)


def test_rows_judge_medians() -> None:
    less = report.Row("stall", "save", "a", "b", "b", 0.5)
    more = report.Row("rate", "save", "a", "b", "b", 1.2, "/s", at_least=True)
    alone = report.Row("adapter", "save", "a", "-", None, 2.0, "µs")
    results = {"save": {"a": [100.0, 1.0, 2.0], "b": [4.0]}}
    assert [row.ratio(results) for row in (less, more, alone)] == [0.5, 0.5, 2.0]
    assert [row.is_met(results) for row in (less, more, alone)] == [True, False, True]
    assert not any(row.is_met({}) for row in (less, more, alone))
    assert report.table({}).count("\n") == 1


def test_pages_are_filled_between_their_marks() -> None:
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    filled = report.filled(page, {"x": "new\nlines"})
    assert filled == "a\n<!-- x -->\nnew\nlines\n<!-- /x -->\nb\n"
    assert report.filled(filled, {"x": "old"}) == page
    assert report.filled("<!-- x -->\n<!-- /x -->", {"x": "new"}) == "<!-- x -->\nnew\n<!-- /x -->"
    with pytest.raises(ValueError, match="no marks for y"):
        report.filled(page, {"y": ""})
