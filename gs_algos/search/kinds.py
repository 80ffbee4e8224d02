"""Says what each kind of knob is: which rows of a plan have it, with which values, and which option its rules set.

A new kind is an entry in `KINDS`; what it does to a network's size goes into `cost`, and what it does to a probe into
`evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from gs_algos.core.plan import PlanRow
from gs_algos.ghost.config import check_ratio
from gs_algos.ghost.planning import GhostPlan
from gs_algos.pruning.budget import keep_count
from gs_algos.pruning.config import check_rate
from gs_algos.pruning.planning import GroupPlan
from gs_algos.quant.network.layer_plan import LayerPlan
from gs_algos.quant.packed.packable import base_of
from gs_algos.quant.scheme import Scheme
from gs_algos.search.target import FLOAT, GHOST_RATIO, Target

Value: TypeAlias = str | float
GHOST = "ghost "  # in front of a ratio, in choices


@dataclass(frozen=True)
class Kind:
    """Describes a kind of knob.

    Args:
        option: of the algorithm, that its rules set.
        default: values, if the user names none of this kind.
        read: returns a choice of the user in its usual form, or None if it is of another kind.
        offer: the values that fit a row, the one that leaves least of the network first; none if it has no such knob.
    """

    option: str
    default: tuple[Value, ...]
    read: Callable[[Any], Value | None]
    offer: Callable[[Target, PlanRow, Any, Sequence[Value]], list[Value]]


def _read_weight(choice: Any) -> Value | None:
    if not isinstance(choice, str) or choice.startswith(GHOST):
        return None
    return FLOAT if choice == FLOAT else str(Scheme.parse(choice, "weight"))


def _offer_weight(target: Target, row: PlanRow, layer: Any, choices: Sequence[Value]) -> list[Value]:
    """Returns the schemes whose groups divide the weight, by their bytes."""
    if layer is None or not hasattr(row.settings, "weight") or base_of(layer) in (None, nn.Embedding):
        return []
    sizes: dict[Value, float] = {}
    reason = ""
    for choice in map(str, choices):
        try:
            sizes[choice] = target.nbytes(row, layer, layer.weight.shape, choice)
        except ValueError as error:
            reason = str(error)
    if not sizes:
        raise ValueError(f"{row.site}: one choice must fit the weight, got none: {reason}")
    return sorted(sizes, key=lambda choice: (choice == FLOAT, sizes[choice]))


def _read_act(choice: Any) -> Value | None:
    return str(Scheme.parse(choice, "act")) if isinstance(choice, str) else None


def _offer_act(target: Target, row: PlanRow, layer: Any, choices: Sequence[Value]) -> list[Value]:
    if not isinstance(row.settings, LayerPlan) or row.settings.act is None or layer is None:
        return []
    return sorted(choices, key=lambda choice: Scheme.parse(str(choice), "act").bits)


def _read_rate(choice: Any) -> Value | None:
    if isinstance(choice, str):
        return None
    check_rate("search", choice)
    return float(choice)


def _offer_rate(target: Target, row: PlanRow, layer: Any, choices: Sequence[Value]) -> list[Value]:
    """Returns the rates that leave different numbers of units, the highest first."""
    if not isinstance(row.settings, GroupPlan) or target.pruned is None:
        return []
    group = next(g for g in target.pruned.groups.prunable() if g.name == row.site)
    pruned = target.pruned
    rates = sorted(choices, reverse=True)
    left = {keep_count(group, float(rate), pruned.round_to, pruned.floor): rate for rate in rates}
    return [left[count] for count in sorted(left)]


def _read_ghost(choice: Any) -> Value | None:
    if choice == FLOAT:
        return FLOAT
    if not isinstance(choice, str) or not choice.startswith(GHOST):
        return None
    number = choice.removeprefix(GHOST)
    ratio = int(number) if number.isdecimal() else number
    check_ratio(ratio, "search: ghost")
    return ratio


def _offer_ghost(target: Target, row: PlanRow, layer: Any, choices: Sequence[Value]) -> list[Value]:
    """Returns the ratios that the channels allow, the highest first, and last the layer as it is."""
    if not isinstance(row.settings, GhostPlan):
        return []
    ratios = [int(choice) for choice in choices if choice != FLOAT and int(choice) <= layer.out_channels]
    return [*sorted(ratios, reverse=True), *([FLOAT] if FLOAT in choices else [])]


KINDS: dict[str, Kind] = {
    "weight": Kind("weight", ("int2@channel", "int4@channel", "int8@channel"), _read_weight, _offer_weight),
    "act": Kind("act", (), _read_act, _offer_act),
    "rate": Kind("rate", (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75), _read_rate, _offer_rate),
    GHOST_RATIO: Kind("ratio", ("ghost 4", "ghost 2", FLOAT), _read_ghost, _offer_ghost),
}
