"""A short version of the long campaign in `scripts/chaos.py`: an independent tool kills and judges."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.programs import RunPython

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos.py"


def test_killed_at_file_events(tmp_path: Path, run_python: RunPython) -> None:
    report = tmp_path / "report.md"
    report.write_text("# What was found\n<!-- chaos: written by python -m scripts.chaos -->\nbefore\n")
    arguments = ["--points", 7, "--only", "one process", "--report", report]
    done = run_python(SCRIPT, *arguments, devices=None, timeout=280, warnings="ignore")
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d killed \(3 before, [1-3] torn, [0-2] term\), failed: none", last), done.stdout
    written = report.read_text()
    assert re.findall(r"^(?:# |## |ckpt-chaos).*", written, re.MULTILINE) == [
        "# What was found",
        "## One process",
        "ckpt-chaos: PASSED",
    ]
