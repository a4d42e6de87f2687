"""The wings of the package, from the imports in its sources: rules that the tests check, and the figure in the docs.

Run `python -m scripts.wings docs/wings.svg` after a change of the imports between wings.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PACKAGE = "torchorbax"

FLOORS = (
    {"torchorbax": "the public names"},
    {"integrations": "other trainers", "cli": "the command line", "report": "what a run has cost"},
    {"run": "resume, Checkpointer, tiers, signals"},
    {"save": "one save", "restore": "one restore", "convert": "other formats"},
    {"verification": "stored steps read again"},
    {"training": "the jitted step", "state": "live objects as leaves", "storage": "steps on disk and in buckets"},
    {"tensors": "what a torch tensor is", "format": "what a step says of itself"},
    {"arrays": "shards, fingerprints, shardings", "distributed": "agreement of processes"},
    {"errors": "every error", "policies": "when to save, what to keep"},
)
"""The wings, the highest first, with what they hold. A wing imports from lower floors only."""

EXCEPTIONS: Mapping[tuple[str, str], str] = {}
"""Arrows that are not downwards, with the reason."""

FOREIGN = {
    "torchax": {"torchorbax._src.tensors.torchax_import"},  # makes torchax importable first
    "orbax": {"storage", "policies"},
    "tensorstore": {"storage"},
}
"""Libraries that only these modules, or modules of these wings, import."""

Graph = Mapping[str, frozenset[str]]


def modules(folder: Path = ROOT / PACKAGE) -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    return {_dotted(path.relative_to(folder.parent)): path for path in sorted(folder.rglob("*.py"))}


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(source: str) -> Iterator[str]:
    """The dotted names that a source imports, anywhere in it; `from a import b` gives `a.b`.

    Raises:
        ValueError: a relative import, which the rules do not follow.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"line {node.lineno}: a relative import")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_graph(sources: Mapping[str, str]) -> Graph:
    """For each module, the modules of the package that it imports by name. Packages that are passed through do not
    count."""
    graph = {}
    for module, source in sources.items():
        names = (name if name in sources else name.rpartition(".")[0] for name in imported(source))
        graph[module] = frozenset(name for name in names if name in sources and name != module)
    return graph


def wing_of(module: str) -> str:
    """The wing that a module stands in; `torchorbax` for the public front."""
    parts = module.removeprefix(f"{PACKAGE}.").removeprefix("_src.").split(".")
    return PACKAGE if parts[0] in (PACKAGE, "__main__", "_src") else parts[0]


def wing_graph(graph: Graph) -> Graph:
    """For each wing, the wings that its modules import from."""
    wings: dict[str, set[str]] = {}
    for module, targets in graph.items():
        wings.setdefault(wing_of(module), set()).update(map(wing_of, targets))
    return {wing: frozenset(targets - {wing}) for wing, targets in wings.items()}


def wrong_arrows(graph: Graph) -> list[str]:
    """Imports between modules that do not lead to a lower floor, apart from the exceptions."""
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if wing_of(module) != wing_of(target)
        and floor[wing_of(target)] <= floor[wing_of(module)]
        and (wing_of(module), wing_of(target)) not in EXCEPTIONS
    ]


def circle(graph: Graph) -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def reachable(graph: Graph, starts: Iterable[str]) -> set[str]:
    """The modules given, and those that they import directly or indirectly."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += graph[module]
    return found


def floors(wings: Graph) -> int:
    """The length of the longest chain of wings in which each imports the next."""
    height: dict[str, int] = {}
    for wing in graphlib.TopologicalSorter(wings).static_order():
        height[wing] = 1 + max((height[target] for target in wings[wing]), default=0)
    return max(height.values())


def not_implied(wings: Graph) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""
    return [
        (wing, target)
        for wing, targets in sorted(wings.items())
        for target in sorted(targets)
        if target not in reachable(wings, targets - {target})
    ]


# The figure.

_WIDTH, _FLOOR, _HEIGHT, _MARGIN = 960, 96, 52, 16  # pixels
_BOX, _GAP, _LANE = 230, 40, 10  # pixels: the width of a wing, between two of them, of an arrow that passes a floor

Point = tuple[float, float]

_STYLE = """
    text { font-family: system-ui, sans-serif; text-anchor: middle; fill: #1f2328 }
    .name { font-size: 15px; font-weight: 600 }
    .what { font-size: 12px; fill: #59636e }
    rect { fill: #eef4fb; stroke: #5b8bc0; stroke-width: 1.5 }
    path { fill: none; stroke: #7d8590; stroke-width: 1.5 }
    marker path { fill: #7d8590; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .what { fill: #9aa4af }
      rect { fill: #1b2a3d; stroke: #5b8bc0 }
    }
"""


def figure(wings: Graph) -> str:
    """An SVG of the wings on their floors. Arrows that follow from others are left out."""
    rows = [[wing for wing in row if wing in wings] for row in FLOORS]
    rows = [row for row in rows if row]
    floor = {wing: number for number, row in enumerate(rows) for wing in row}
    routes = [_route(wing, target, floor) for wing, target in not_implied(wings)]
    place = _places(rows, routes)
    what = {wing: text for row in FLOORS for wing, text in row.items()}
    lines = [_arrow([place[stop] for stop in route]) for route in routes]
    lines += [line for wing in floor for line in _box(place[wing], wing, what[wing])]
    height = _FLOOR * (len(rows) - 1) + _HEIGHT + 2 * _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            "  <title>The wings of torchorbax; an arrow leads from a wing to one that it imports</title>",
            f"  <style>{_STYLE}  </style>",
            '  <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z"/></marker>',
            *(f"  {line}" for line in lines),
            "</svg>\n",
        ]
    )


def _route(wing: str, target: str, floor: Mapping[str, int]) -> list[str]:
    """What an arrow passes: its wing, a lane of its own through each floor between, and its target."""
    between = range(floor[wing] + 1, floor[target])
    return [wing, *(f"{wing} > {target} {number}" for number in between), target]


def _places(rows: list[list[str]], routes: list[list[str]]) -> dict[str, Point]:
    """The middle of the upper edge of every wing and lane, each below the middle of those that lead to it."""
    above: dict[str, list[str]] = {}
    lanes: list[list[str]] = [[] for _ in rows]
    floor = {wing: number for number, row in enumerate(rows) for wing in row}
    for route in routes:
        for stop, after in itertools.pairwise(route):
            above.setdefault(after, []).append(stop)
        for number, lane in enumerate(route[1:-1], floor[route[0]] + 1):
            lanes[number].append(lane)
    place: dict[str, Point] = {}
    for number, row in enumerate(rows):

        def middle(stop: str) -> float:
            xs = [place[upper][0] for upper in above.get(stop, ()) if upper in place]
            return sum(xs) / len(xs) if xs else _WIDTH / 2

        stops = sorted(row + lanes[number], key=middle)
        widths = [_BOX if stop in floor else _LANE for stop in stops]
        left = (_WIDTH - sum(widths) - _GAP * (len(stops) - 1)) / 2
        for stop, width in zip(stops, widths, strict=True):
            place[stop] = left + width / 2, _MARGIN + _FLOOR * number
            left += width + _GAP
    return place


def _box(place: Point, name: str, what: str) -> list[str]:
    x, y = place
    return [
        f'<rect x="{x - _BOX / 2:g}" y="{y:g}" width="{_BOX}" height="{_HEIGHT}" rx="8"/>',
        f'<text class="name" x="{x:g}" y="{y + 22:g}">{escape(name)}</text>',
        f'<text class="what" x="{x:g}" y="{y + 40:g}">{escape(what)}</text>',
    ]


def _arrow(stops: list[Point]) -> str:
    """A line from the lower edge of a box, straight through the lanes, to the upper edge of another box."""
    x, y = stops[0][0] + _lean(stops[0], stops[1]), stops[0][1] + _HEIGHT
    path = f"M{x:g} {y:g}"
    for number, (x2, y2) in enumerate(stops[1:], 1):
        is_last = number == len(stops) - 1
        x2 = x2 + _lean(stops[-1], stops[-2]) if is_last else x2
        bend = (y2 - y) / 2
        path += f" C{x:g} {y + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" + ("" if is_last else f" v{_HEIGHT}")
        x, y = x2, y2 + _HEIGHT
    return f'<path marker-end="url(#head)" d="{path}"/>'


def _lean(place: Point, other: Point) -> float:
    """How far from the middle of a box an arrow starts or ends, so that not all of them meet in one point."""
    return max(-_BOX / 3, min(_BOX / 3, (other[0] - place[0]) / 4))


def main(target: str) -> None:
    sources = {module: path.read_text() for module, path in modules().items()}
    Path(target).write_text(figure(wing_graph(module_graph(sources))))


if __name__ == "__main__":
    main(*sys.argv[1:])
