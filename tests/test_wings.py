"""The package stands in wings: imports lead downwards, in no circle, and only a few rooms know a foreign library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts import wings

SOURCES = {module: path.read_text() for module, path in wings.modules().items()}
GRAPH = wings.module_graph(SOURCES)
PAGES = [wings.ROOT / "README.md", wings.ROOT / "CONTRIBUTING.md", *sorted((wings.ROOT / "docs").glob("*.md"))]
MEASURES_INTERNALS = {
    "benchmarks/cases.py": "times the fingerprint alone",
    "benchmarks/scaling.py": "times manifests, fingerprints and the agreement of many processes, without a run",
}


def test_imports_lead_to_lower_floors() -> None:
    assert wings.wrong_arrows(GRAPH) == []


def test_every_exception_is_needed() -> None:
    arrows = {(wing, target) for wing, targets in wings.wing_graph(GRAPH).items() for target in targets}
    assert set(wings.EXCEPTIONS) <= arrows


def test_modules_import_in_no_circle() -> None:
    assert wings.circle(GRAPH) is None


def test_the_house_stays_small() -> None:
    found = wings.wing_graph(GRAPH)
    assert wings.floors(found) <= 9
    assert sum(map(len, found.values())) <= 63


def test_modules_and_functions_stay_short() -> None:
    """400 lines and 60, docstrings aside: what is longer has more than one reason to change."""
    long = {module: len(source.splitlines()) for module, source in SOURCES.items() if len(source.splitlines()) > 400}
    for module, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)
                if lines > 60:
                    long[f"{module}.{node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("library", wings.FOREIGN)
def test_few_rooms_import_a_foreign_library(library: str) -> None:
    importing = {
        module
        for module, source in SOURCES.items()
        if library in {name.partition(".")[0] for name in wings.imported(source)}
    }
    rooms = wings.FOREIGN[library]
    assert importing
    assert {module for module in importing if not {module, wings.wing_of(module)} & rooms} == set()


def test_bytes_are_stored_and_checked_without_torchax() -> None:
    starts = [
        module
        for module in GRAPH
        if wings.wing_of(module) in ("storage", "format") or module == "torchorbax._src.arrays.fingerprint"
    ]
    (torchax,) = wings.FOREIGN["torchax"]
    assert len(starts) > 5
    assert torchax in GRAPH
    assert {start for start in starts if torchax in wings.reachable(GRAPH, [start])} == set()


def test_only_the_package_and_its_tests_import_internals() -> None:
    programs = [
        path for folder in ("examples", "benchmarks", "scripts") for path in sorted((wings.ROOT / folder).glob("*.py"))
    ]
    snippets = {page: "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)) for page in PAGES}
    sources = {**{path: path.read_text() for path in programs}, **snippets}
    found = {str(path.relative_to(wings.ROOT)) for path, source in sources.items() if _imports_internals(source)}
    assert found == set(MEASURES_INTERNALS)


def _imports_internals(source: str) -> bool:
    return any(name.startswith("torchorbax._src") for name in wings.imported(source))


def test_the_figure_is_up_to_date() -> None:
    committed = (wings.ROOT / "docs" / "wings.svg").read_text()
    assert committed == wings.figure(wings.wing_graph(GRAPH)), "run: python -m scripts.wings docs/wings.svg"


def test_the_architecture_page_names_every_module_and_no_other() -> None:
    page = (wings.ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M))
    named = {f"{wing}.{room}" for wing, text in rows.items() for room in re.findall(r"`(\w+)`", text)}
    there = {
        module.removeprefix("torchorbax._src.")
        for module in SOURCES
        if module.startswith("torchorbax._src.") and module.count(".") > 2
    }
    assert named == there


# The rules themselves, on sources made up for the purpose.


def broken(**changes: str) -> wings.Graph:
    return wings.module_graph({**SOURCES, **{f"torchorbax._src.{name}": text for name, text in changes.items()}})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("arrays.new", "from torchorbax._src.tensors import live"),
        ("save.new", "from torchorbax._src.restore.plan import Plan"),
        ("storage.new", "def late():\n    import torchorbax._src.state.item"),
        ("run.new", "from torchorbax import resume"),
    ],
)
def test_imports_that_do_not_lead_down_are_found(module: str, source: str) -> None:
    wrong = wings.wrong_arrows(broken(**{module: source}))
    assert len(wrong) == 1
    assert wrong[0].startswith(f"torchorbax._src.{module} imports ")


def test_circles_are_found() -> None:
    graph = broken(
        **{
            "run.one": "from torchorbax._src.run import two",
            "run.two": "from torchorbax._src.run.one import anything",
        }
    )
    assert {"torchorbax._src.run.one", "torchorbax._src.run.two"} <= set(wings.circle(graph) or ())


def test_relative_imports_are_refused() -> None:
    with pytest.raises(ValueError, match="line 1: a relative import"):
        list(wings.imported("from . import neighbour"))


def test_what_is_imported_indirectly_is_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset()}
    assert wings.reachable(graph, "b") == {"a", "b", "c"}


def test_the_figure_leaves_out_arrows_that_follow_from_others() -> None:
    graph = {"run": frozenset({"save", "errors"}), "save": frozenset({"errors"}), "errors": frozenset[str]()}
    assert wings.not_implied(graph) == [("run", "save"), ("save", "errors")]
    assert wings.floors(graph) == 3
    assert wings.figure(graph).count("marker-end") == 2


def test_the_figure_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    wings.main(str(tmp_path / "wings.svg"))
    assert (tmp_path / "wings.svg").read_text().startswith("<svg")
