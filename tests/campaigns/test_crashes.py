"""Short versions of the long campaigns in `scripts/`, and of the comparison that they are for."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.programs import RunPython

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_forty_kills(tmp_path: Path, run_python: RunPython) -> None:
    done = run_python(
        SCRIPTS / "crashtest.py", "--trials", 40, "--steps", 12, devices=None, timeout=280, warnings="ignore"
    )
    assert done.stdout.splitlines()[-1] == "40 trials, 0 failures"
    killed = sum(
        int(count) for count, how in re.findall(r"^ *(\d+)  (.*)$", done.stdout, re.MULTILINE) if "(" not in how
    )
    assert killed >= 25  # the others came to the end of the run first


def test_flipped_bits_beside_others(run_python: RunPython) -> None:
    done = run_python(SCRIPTS / "bitflips.py", "--flips", 3, devices=None, timeout=280, warnings="ignore")
    rows = {line[:36].strip(): [int(number) for number in line[36:].split()] for line in done.stdout.splitlines()[1:]}
    assert len(rows) == 4
    assert rows["torchorbax"] == [3, 3, 0]  # flips, noticed, silent
