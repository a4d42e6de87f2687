"""A short version of the campaign of hostile checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.campaigns.hostile_mutations import MUTATIONS
from tests.helpers.programs import RunPython

CAMPAIGN = Path(__file__).parent / "hostile.py"


@pytest.mark.timeout(400)
def test_no_hostile_checkpoint_does_more_than_be_refused(run_python: RunPython) -> None:
    done = run_python(
        CAMPAIGN, "--mutations", 150, "--workers", 2, devices=None, timeout=380, warnings="ignore", check=False
    )
    assert done.stdout.splitlines()[-1] == "150 mutations, 0 failures", done.stdout
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", done.stdout, re.M)
    }
    assert rows.keys() == {mutation.__name__.replace("_", " ") for mutation in MUTATIONS} | {"all"}
    refused, restored, _, failures = map(int, rows["all"])
    assert (refused > 60, restored > 0, failures) == (True, True, 0)  # most changes are found; some mean nothing
