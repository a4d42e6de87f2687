"""The `torchorbax` command: shows and verifies what is in the folder of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.restore import verify as verification
from torchorbax._src.storage.opening import open_storage
from torchorbax.errors import CorruptCheckpointError, TorchorbaxError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look into the checkpoints of a run.")
_console = Console()

RunPath = Annotated[str, typer.Argument(metavar="PATH", help="A run's folder or gs:// URI.")]


@app.command("ls")
def list_steps(path: RunPath) -> None:
    """List the committed steps, with their time, size and metrics."""
    storage = open_storage(path)
    table = Table("step", "saved (UTC)", "arrays", "metrics")
    for step in storage.existing_steps():
        try:
            manifest = storage.manifest(step)
        except CorruptCheckpointError as error:
            table.add_row(str(step), "damaged", "", error.reasons[step])
            continue
        leaves = [leaf for item in manifest.items.values() for leaf in item.leaves.values()]
        metrics = ", ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items())
        table.add_row(str(step), f"{manifest.time:%Y-%m-%d %H:%M:%S}", _size(leaves), metrics)
    _console.print(table)


@app.command()
def inspect(
    path: RunPath, step: Annotated[int | None, typer.Option(help="Which step; the newest if not given.")] = None
) -> None:
    """Show every array of a step: name, dtype, shape and how it was sharded."""
    storage = open_storage(path)
    manifest = storage.manifest(storage.existing_steps()[-1] if step is None else step)
    for name, item in manifest.items.items():
        table = Table(
            "name", "dtype", "shape", "sharding", title=f"{name} ({item.kind}, {_size(item.leaves.values())})"
        )
        for leaf, meta in item.leaves.items():
            sharding = f"{meta.sharding['spec']} on {meta.sharding['mesh']}" if meta.sharding else meta.residence
            table.add_row(leaf, meta.dtype, str(meta.shape), sharding)
        for alias, leaf in item.ties.items():
            table.add_row(alias, "", "", f"tied to {leaf}")
        _console.print(table)


@app.command()
def verify(
    path: RunPath, step: Annotated[int | None, typer.Option(help="Which step; all of them if not given.")] = None
) -> None:
    """Read every byte again and compare it with the fingerprints made when it was saved; exit code 1 on damage."""
    for good in verification.verify(path, step):
        _console.print(f"step {good}: every byte is as it was saved")


def main() -> None:
    """Run the command; an error of torchorbax is a message and exit code 1."""
    try:
        app()
    except TorchorbaxError as error:
        sys.exit(f"error: {error}")


def _size(leaves: Iterable[LeafMeta]) -> str:
    size = float(sum(leaf.nbytes for leaf in leaves))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
