"""The crash test with forty kills; `scripts/crashtest.py --trials 1000` is the long one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import RunPython

SCRIPT = Path(__file__).parent.parent / "scripts" / "crashtest.py"


def test_forty_kills(tmp_path: Path, run_python: RunPython) -> None:
    done = run_python(SCRIPT, "--trials", 40, "--steps", 12, devices=None, timeout=280, warnings="ignore")
    assert done.stdout.splitlines()[-1] == "40 trials, 0 failures"
    killed = sum(
        int(count) for count, how in re.findall(r"^ *(\d+)  (.*)$", done.stdout, re.MULTILINE) if "(" not in how
    )
    assert killed >= 25  # the others came to the end of the run first
