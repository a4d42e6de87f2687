"""Plans a restore: compares the manifest of a step with the live objects, and reports every mismatch at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, Manifest
from torchorbax._src.format.values import LayoutError
from torchorbax._src.state.compare import advice, with_suggestions
from torchorbax._src.state.item import RNG, Item, ItemPlan
from torchorbax._src.state.request import Request
from torchorbax.errors import CorruptCheckpointError, MismatchError, Problem, TorchorbaxError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a restore is going to do.

    Attributes:
        items: the plan for each item that is restored.
        left_out: the problems because of which leaves or items are not restored; empty if the request is strict.
    """

    items: Mapping[str, ItemPlan]
    left_out: tuple[Problem, ...]


def planned(
    path: str, manifest: Manifest, items: Mapping[str, Item], rules: ShardingRules | None, request: Request
) -> Plan:
    """Compare a step with the live objects. Nothing is read and no live object is changed.

    Args:
        path: the path of the run, for messages.
        manifest: the manifest of the step.
        items: the live objects.
        rules: the sharding rules; None keeps every live tensor's sharding.
        request: what is to be restored.

    Raises:
        MismatchError: the request is strict and something differs, or nothing fits at all.
        ConfigError: the request names an item or leaf that neither side has.
        CorruptCheckpointError: the content of an item does not have the form of its kind.
    """
    source = f"{path}: step {manifest.step}"
    # The items on both sides that the request is about.
    saved = {name: item for name, item in manifest.items.items() if request.concerns(name) and name != RNG}
    live = {name: item for name, item in items.items() if request.concerns(name) and name != RNG}
    if RNG in items and request.concerns(RNG):
        if RNG in manifest.items:  # generators that were not saved go on as they are
            saved[RNG], live[RNG] = manifest.items[RNG], items[RNG]
        else:
            _logger.warning("%s has no random number generators; those of this process go on", source)
    # The plan of each item, and all problems.
    problems = [
        Problem("missing", name, "the whole item", item.kind) for name, item in live.items() if name not in saved
    ]
    plans: dict[str, ItemPlan] = {}
    for name, meta in saved.items():
        if name not in live:
            problems.append(Problem("unexpected", name, "the whole item", "", f"a {meta.kind} item"))
        elif live[name].kind != meta.kind:
            problems.append(Problem("placement", name, "the whole item", f"{live[name].kind}", f"a {meta.kind} item"))
        else:
            with _as_corrupt(path, manifest.step, name, meta):
                plans[name] = live[name].plan(meta, rules, request)
            problems += plans[name].problems
    # Raise, unless what fits may be restored.
    problems = with_suggestions(problems)
    nothing_fits = not any(plan.restores_something for name, plan in plans.items() if name != RNG)
    if problems and (request.strict or nothing_fits):
        raise MismatchError(source, problems, advice(problems))
    request.check_used()
    return Plan(plans, tuple(problems))


@contextmanager
def _as_corrupt(path: str, step: int, name: str, meta: ItemMeta) -> Iterator[None]:
    """Translate a `LayoutError` of the planning of one item: the manifest is well-formed, but the step is damaged.

    Any other error is a fault in this library or in the user's objects. It says nothing about the step.
    """
    try:
        yield
    except TorchorbaxError:
        raise
    except LayoutError as error:
        reason = f"item {name} does not have what belongs to a {meta.kind}: {error}"
        raise CorruptCheckpointError(path, {step: reason[:300]}) from error
    except Exception as error:  # raised again, with a note
        error.add_note(f"{path}: step {step}: while item {name}, a {meta.kind}, was compared with the live one")
        raise
