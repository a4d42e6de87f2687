"""Every Python block in the README and the docs runs, in order, in a program of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.programs import RunPython

ROOT = Path(__file__).parents[2]
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in page.read_text()
]


# Orbax, when it restores without a target, as the README shows that it can; torchdata, of a call that torch deprecates.
OTHERS_WARN = """
import warnings
warnings.filterwarnings("ignore", "Sharding info not provided")
warnings.filterwarnings("ignore", "'set_vital' is deprecated")
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, run_python: RunPython) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    run_python("\n".join([OTHERS_WARN, *blocks]), devices=None)


def test_readme_starts_with_the_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]
