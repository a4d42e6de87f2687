"""A short version of the campaign of SIGTERM at every kind of moment."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.sigterm import MOMENTS, run_trials

SHORT = ("training", "loader", "compilation", "stderr", "workers", "close")


def test_sigterm_at_six_kinds_of_moments(tmp_path: Path) -> None:
    moments = [moment for moment in MOMENTS if moment.name in SHORT]
    campaign = run_trials(tmp_path / "sigterm", moments, trials=len(moments), seed=0)
    assert campaign.outcomes == dict.fromkeys(SHORT, 1)
