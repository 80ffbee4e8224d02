"""Holds an algorithm whose rules are searched: its plan, and what a layer of it takes in each of its forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Algorithm, Inputs
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import get_module
from gs_algos.core.plan import PlanRow
from gs_algos.ghost.planning import GhostPlan
from gs_algos.pruning.budget import keep_by_layer
from gs_algos.pruning.channel_groups.groups import Groups
from gs_algos.pruning.importance import l2, unit_scores
from gs_algos.pruning.planning import make_plan
from gs_algos.pruning.pruner import Pruner
from gs_algos.ptq.ptq import RoundedPlan
from gs_algos.quant.integer.layers import empty_codes
from gs_algos.quant.network.layer_plan import LayerPlan
from gs_algos.quant.packed.packable import format_of
from gs_algos.quant.scheme import Scheme, n_scales

FLOAT = "float"  # the choice of a layer that is left as it is
GHOST_RATIO = "ghost ratio"  # the kind of knob that Ghost has
OPTIONS = (("weight", "weight"), ("act", "act"), (GHOST_RATIO, "ratio"))  # kinds of knobs, and what rules set
FINEST = 1 - 1e-9  # a rate at which every group loses all the units that it can


@dataclass(frozen=True, eq=False)
class Pruned:
    """Holds what a pruning algorithm can cut.

    Args:
        scores: `[units]`, the higher, the more a unit matters.
        rates: group -> the rate that a rule gives it, or None; groups that stay whole are not in it.
        round_to, floor: of the channels that stay.
    """

    groups: Groups
    scores: Tensor
    rates: Mapping[str, float | None]
    round_to: int
    floor: int = 1

    def keep(self, rates: Mapping[str, float]) -> Tensor:
        """Returns the units that stay at these rates, bool `[units]`; groups without a rate stay whole."""
        every = {group.name: rates.get(group.name, 0.0) for group in self.groups.prunable()}
        return keep_by_layer(self.groups, self.scores, every, 0.0, self.round_to, self.floor)


@dataclass(frozen=True, eq=False)
class Target:
    """Holds one of the algorithms.

    Args:
        number: its place among them.
        rows: those of its plan that act.
        ruled: kind of knob -> layers for which a rule of the user sets it.
        pruned: of an algorithm that cuts channels.
    """

    number: int
    algorithm: Algorithm
    rows: tuple[PlanRow, ...]
    ruled: Mapping[str, frozenset[str]]
    pruned: Pruned | None = None

    @classmethod
    def of(cls, number: int, algorithm: Algorithm, network: nn.Module, inputs: Inputs, who: str) -> Target:
        """Plans an algorithm on the float network, which stays as it is.

        Raises:
            ValueError: as its `plan`, or if it has a budget of its own.
        """
        if isinstance(algorithm, Pruner):
            return cls._of_pruner(number, algorithm, network, inputs, who)
        rows = algorithm.plan(network, inputs).acted()
        sites = {row.site: _module(network, row.site) for row in rows}
        return cls(number, algorithm, rows, {kind: ruled(algorithm, option, sites) for kind, option in OPTIONS})

    @classmethod
    def _of_pruner(cls, number: int, algorithm: Pruner, network: nn.Module, inputs: Inputs, who: str) -> Target:
        config = algorithm.config
        if config.budget is not None:
            raise ValueError(
                f"{who}: {algorithm.name} must have no budget of its own, got {config.budget!r}; give it to the search"
            )
        config = replace(config, rate=FINEST, scope="layer")
        plan, groups, rates = make_plan(algorithm.name, config, network, inputs, algorithm.why_unscored)
        known = algorithm.scores_weights
        scores = algorithm.scores(network, groups) if known else unit_scores(network, groups, l2)
        scores = torch.where(scores.isnan(), torch.inf, scores)
        free = frozenset(name for name, rate in rates.items() if rate is not None)
        pruned = Pruned(groups, scores, rates, config.round_to, config.floor)
        return cls(number, algorithm, plan.acted(), {"rate": free}, pruned)

    def nbytes(self, row: PlanRow, layer: Any, shape: Sequence[int], scheme: str) -> int:
        """Returns the bytes of a weight of this shape once it is compressed.

        Raises:
            ValueError: if the scheme does not fit the shape.
        """
        if scheme == FLOAT:
            return math.prod(shape) * layer.weight.element_size()
        if isinstance(row.settings, RoundedPlan):
            weight = torch.empty(tuple(shape), dtype=layer.weight.dtype, device="meta")
            return format_of(layer, weight, Scheme.parse(scheme, "weight")).nbytes
        options = getattr(self.algorithm.config, "options", None)
        if options is not None:
            if scheme[0] in "iu":  # a grid of SLB may have a text of its own
                n_scales(Scheme.parse(scheme, "weight").granularity, torch.Size(shape))
            return int(options().nbytes(replace(row.settings, weight=scheme, shape=tuple(shape))))
        parsed = Scheme.parse(scheme, "weight")
        n_scales(parsed.granularity, torch.Size(shape))
        return empty_codes(shape, parsed, "meta").nbytes

    def own(self, row: PlanRow, kind: str) -> str | float | None:
        """Returns what the algorithm does to a layer without a rule of the search."""
        if kind == "rate":
            return None if self.pruned is None else self.pruned.rates.get(row.site)
        if isinstance(row.settings, GhostPlan):
            return row.settings.ratio if kind == GHOST_RATIO else None
        if isinstance(row.settings, LayerPlan | RoundedPlan):
            return getattr(row.settings, kind, None)  # type: ignore[no-any-return]
        return None


def ruled(algorithm: Algorithm, option: str, sites: Mapping[str, nn.Module | None]) -> frozenset[str]:
    """Returns the layers for which the algorithm's own rules set an option, or leave them as they are."""
    rules = getattr(algorithm.config, "rules", ())
    options = {name: None for _, values in rules if values for name in values} | {option: None}
    found = {}
    for rule in rules:  # one by one: a layer that is not planned may be the only one that a rule matches
        try:
            found.update({s: v for s, v in resolve([rule], sites, options, "search").items() if v != options})
        except ValueError:
            continue
    return frozenset(site for site, values in found.items() if values is None or values[option] is not None)


def _module(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return get_module(network, name)
    except (AttributeError, KeyError, ValueError):
        return None  # an add, or a function, has no module
