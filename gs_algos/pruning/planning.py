"""Plans a cut: which groups lose units, how many, and why the others stay whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import get_module
from gs_algos.core.plan import Plan, PlanRow, with_settings
from gs_algos.core.plan_settings import RowSettings
from gs_algos.pruning.budget import (
    Budget,
    Rates,
    keep_by_layer,
    keep_count,
    keep_globally,
    latency_cost,
    meet,
    static_cost,
)
from gs_algos.pruning.channel_groups.find import find_groups
from gs_algos.pruning.channel_groups.groups import Group, Groups
from gs_algos.pruning.config import PruningConfig
from gs_algos.quant.packed.module import Packed

PACKED = "is packed, and its codes cannot be cut; prune before quantizing"


@dataclass(frozen=True)
class GroupPlan(RowSettings):
    """Names the layers of a group, which lose the same units.

    Args:
        layers: their names, the one that the row is named after first.
        units: how many there are before the cut.
        channels: channels of a layer that go with one unit.
    """

    form: ClassVar[str] = "group"

    layers: tuple[str, ...]
    units: int
    channels: int


def from_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a history entry of a checkpoint of version 1 in the words of version 2."""
    return with_settings(entry, lambda row: {"form": GroupPlan.form, **row["settings"]} if row["settings"] else None)


# why an algorithm cannot score the units of a group; empty if it can
WhyUnscored = Callable[[nn.Module, Group, Groups], str]


def make_plan(
    name: str, config: PruningConfig, model: nn.Module, example_inputs: Inputs, why_unscored: WhyUnscored
) -> tuple[Plan, Groups, Rates]:
    """Returns the plan, its groups, and the rate of each group that is cut (None: by the scores of all).

    Raises:
        ValueError: if the inputs do not run through the model, a rule matches nothing, or no cut meets the budget.
    """
    groups = find_groups(model, example_inputs)
    whole = {group.name: why for group in groups.prunable() if (why := why_unscored(model, group, groups))}
    rates = _rates(config, model, groups, whole)
    rates = _with_budget(config, model, groups, rates, example_inputs)
    # the counts of scope="layer" do not depend on the scores
    keep = choose_units(config, groups, torch.zeros(groups.n), rates, model) if config.scope == "layer" else None
    rows = [_row(model, group, config, whole, keep) for group in groups.groups]
    packed = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, Packed)}
    rows += [PlanRow(name, kind, "keep", "", PACKED) for name, kind in packed.items()]
    return Plan(name, "running it", tuple(rows), groups.notes), groups, rates


def choose_units(config: PruningConfig, groups: Groups, scores: Tensor, rates: Rates, model: nn.Module) -> Tensor:
    """Chooses the units that stay, bool `[units]`. Units without a score (NaN) are the last to go.

    Raises:
        ValueError: if no cut meets the budget.
    """
    scores = torch.where(scores.isnan(), torch.inf, scores)
    if config.budget is None or config.scope == "layer":
        return _keep(config, groups, scores, rates, config.rate)
    budget = Budget.parse(config.budget)
    cost = static_cost(budget.kind, model, groups)
    return meet(budget, lambda rate: _keep(config, groups, scores, rates, rate), cost)


def _keep(config: PruningConfig, groups: Groups, scores: Tensor, rates: Rates, rate: float) -> Tensor:
    every = {group.name: rates.get(group.name, 0.0) for group in groups.prunable()}
    keep = keep_by_layer if config.scope == "layer" else keep_globally
    return keep(groups, scores, every, rate, config.round_to, config.floor)


def _rates(config: PruningConfig, model: nn.Module, groups: Groups, whole: dict[str, str]) -> Rates:
    """Returns group -> its own rate, or None for the common one. Groups that stay whole are in `whole` instead."""
    sites = {layer.name: get_module(model, layer.name) for g in groups.groups for layer in g.layers}
    settings = resolve(config.rules, sites, {"rate": None}, config.who)
    rates: dict[str, float | None] = {}
    for group in groups.prunable():
        given = [settings[layer.name] for layer in group.layers]
        if None in given:
            left = [layer.name for layer in group.layers if settings[layer.name] is None]
            whole[group.name] = f"a rule leaves {', '.join(left)} whole"
        if group.name in whole:
            continue
        own = [values["rate"] for values in given if values and values["rate"] is not None]
        rates[group.name] = min(own) if own else None
    return rates


def _with_budget(config: PruningConfig, model: nn.Module, groups: Groups, rates: Rates, inputs: Inputs) -> Rates:
    """Returns the rates, with a budget resolved as far as it can be without scores."""
    if config.budget is None:
        return rates
    budget, scores = Budget.parse(config.budget), torch.zeros(groups.n)
    if budget.kind == "latency":
        cost = latency_cost(model, groups, inputs)
    else:
        cost = static_cost(budget.kind, model, groups)
    keep = meet(budget, lambda rate: _keep(config, groups, scores, rates, rate), cost)
    if config.scope == "global":
        return rates
    gone = {g.name: 1 - float(keep[g.first : g.first + g.n].double().mean()) for g in groups.prunable()}
    return {name: gone[name] for name in rates}


def _row(model: nn.Module, group: Group, config: PruningConfig, whole: dict[str, str], keep: Tensor | None) -> PlanRow:
    kind = type(get_module(model, group.name)).__name__
    coupled = [f"{x.name} x{w}" if w > 1 else x.name for x, w in zip(group.layers, group.widths, strict=True)]
    detail = f"with {', '.join(coupled[1:])}" if len(coupled) > 1 else ""
    settings = GroupPlan(tuple(layer.name for layer in group.layers), group.n, group.channels)
    if not group.n or group.name in whole:
        return PlanRow(group.name, kind, "keep", detail, whole.get(group.name, group.reason))
    if keep is None:
        least = keep_count(group, 1.0, config.round_to, config.floor)
        gone, action = group.n - least, f"prune some of {group.n} by score"
    else:
        gone = int((~keep[group.first : group.first + group.n]).sum())
        action = f"prune {gone} of {group.n}"
    if not gone:
        times = f", of which {config.floor} always stay" if config.floor > 1 else ""
        reason = f"all {group.n} units stay at this rate, in multiples of {config.round_to} channels{times}"
        return PlanRow(group.name, kind, "keep", detail, reason)
    return PlanRow(group.name, kind, action, detail, "", settings)
