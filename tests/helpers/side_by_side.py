"""How tests run side by side: modules are kept together, and those that keep several processes busy are one unit.

xdist's own `--dist loadgroup` would do, but xdist 3.8 cannot group tests with pytest 9.2, and does not say so.
"""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parents[1]
SEVERAL_PROCESSES = "several processes"
BUSY_TOO = ("campaigns/test_matrix.py", "examples/test_train_digits.py")
"""Modules that start several busy processes without `run_processes`."""
LONGEST_FIRST = ("campaigns", "examples", "storage", "run", "helpers")


@functools.cache
def unit_of(module: Path) -> str:
    """What a worker takes as a whole: a module, or all modules that start several processes.

    Such processes would keep each other waiting, and have time-outs.
    """
    name = module.relative_to(TESTS).as_posix()
    return SEVERAL_PROCESSES if name in BUSY_TOO or "run_processes" in module.read_text() else name


def place_of(module: Path) -> int:
    """Where a module stands in the order of all, so that no long one is left for the end."""
    if unit_of(module) == SEVERAL_PROCESSES:
        return 0
    folder = module.relative_to(TESTS).parts[0]
    return 1 + (LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST))


class ByUnit(LoadScopeScheduling):
    """Hands out units in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(self.config.rootpath / nodeid.partition("::")[0])
