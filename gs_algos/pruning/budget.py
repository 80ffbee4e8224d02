"""Chooses how many units of each group stay: by a rate, or the largest network that a budget allows."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.untouched import untouched
from gs_algos.pruning.channel_groups.groups import Group, Groups
from gs_algos.pruning.cut import cut

KINDS = ("channels", "params", "flops", "latency")
ROUNDS = {"channels": 30, "params": 30, "flops": 30, "latency": 7}  # halvings of the search for a rate

REPEATS = 5  # of a latency measurement
Rates = Mapping[str, float | None]  # group -> its own rate; None leaves the choice to the common one
Choose = Callable[[float], Tensor]  # a common rate -> bool [n], the units that stay


@dataclass(frozen=True)
class Budget:
    """Says what may remain of the network: `55% flops`, `40% params`, `50% channels`, `70% latency`."""

    percent: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads the text of a budget.

        Raises:
            ValueError: if the text is no percentage in (0, 100] of one of the kinds.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*(\w+)\s*", text) if isinstance(text, str) else None
        if match is None or match[2] not in KINDS or not 0 < float(match[1]) <= 100:
            share = isinstance(text, float) and 0 < text < 1
            example = f"use '{100 * text:g}% flops'" if share else "for example '55% flops'"  # type: ignore[operator]
            raise ValueError(
                f"budget: must be what may remain, as a percentage of {', '.join(KINDS)}, got {text!r}; {example}"
            )
        return cls(float(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.percent:g}% {self.kind}"


def step_of(group: Group, round_to: int) -> int:
    """Returns the units by which a group may shrink so that every layer keeps a multiple of `round_to` channels."""
    return math.lcm(*(round_to // math.gcd(round_to, width) for width in group.widths))


def keep_count(group: Group, rate: float, round_to: int, floor: int = 1) -> int:
    """Counts the units that stay: at least `1 - rate` of them, rounded up to whole steps, of which `floor` stay."""
    step = step_of(group, round_to)
    left = group.n - math.floor(rate * group.n + 1e-9)
    return min(group.n, max(floor, math.ceil(left / step)) * step)


def keep_by_layer(groups: Groups, scores: Tensor, rates: Rates, rate: float, round_to: int, floor: int = 1) -> Tensor:
    """Keeps the best units of each group. rates: a group's own rate, which goes before the common one."""
    keep = groups.everything()
    for group in groups.prunable():
        own = rates[group.name]
        count = keep_count(group, rate if own is None else own, round_to, floor)
        _keep_best(keep, group, scores, count)
    return keep


def keep_globally(groups: Groups, scores: Tensor, rates: Rates, rate: float, round_to: int, floor: int = 1) -> Tensor:
    """Keeps the best units of all groups together, by channels; every group keeps at least `floor` steps of units.

    Scores are compared between groups as they are. A group with a rate of its own is cut at that rate.
    """
    keep = keep_by_layer(groups, scores, rates, 0.0, round_to, floor)
    free = [group for group in groups.prunable() if rates[group.name] is None]
    if not free:
        return keep
    index = torch.cat([torch.arange(g.first, g.first + g.n) for g in free])
    size = torch.cat([torch.full((g.n,), sum(g.widths)) for g in free])
    safe = torch.zeros(groups.n, dtype=torch.bool)
    for group in free:  # what a group always keeps is not counted among what can go
        best = torch.zeros(groups.n, dtype=torch.bool)
        best[group.first : group.first + group.n] = True
        _keep_best(best, group, scores, keep_count(group, 1.0, round_to, floor))
        safe |= best
    order = torch.argsort(torch.where(safe[index], torch.inf, scores[index]), stable=True)
    going = size[order].cumsum(0) <= rate * int(size.sum()) + 1e-9
    keep[index[order[going & ~safe[index[order]]]]] = False
    for group in free:
        kept = int(keep[group.first : group.first + group.n].sum())
        step = step_of(group, round_to)
        _keep_best(keep, group, scores, min(group.n, math.ceil(kept / step) * step))
    return keep


def _keep_best(keep: Tensor, group: Group, scores: Tensor, count: int) -> None:
    part = slice(group.first, group.first + group.n)
    order = torch.argsort(scores[part], descending=True, stable=True)
    chosen = torch.zeros(group.n, dtype=torch.bool)
    chosen[order[:count]] = True
    keep[part] = chosen


def meet(budget: Budget, choose: Choose, cost: Callable[[Tensor], float]) -> Tensor:
    """Returns the units that stay at the smallest common rate whose network meets the budget.

    Args:
        cost: percent of the whole network's cost that remains if these units stay.

    Raises:
        ValueError: if even the smallest network costs more; says what the least is.
    """
    low, high = 0.0, 1.0
    best = choose(high)
    least = cost(best)
    if least > budget.percent:
        raise ValueError(
            f"budget: must be one that the network can meet, got {budget}; the least that can remain is {least:.1f}% "
            f"{budget.kind}"
        )
    if cost(choose(low)) <= budget.percent:
        return choose(low)
    for _ in range(ROUNDS[budget.kind]):
        middle = (low + high) / 2
        keep = choose(middle)
        if cost(keep) <= budget.percent:
            high, best = middle, keep
        else:
            low = middle
    return best


def static_cost(kind: str, model: nn.Module, groups: Groups) -> Callable[[Tensor], float]:
    """Returns a function that gives the percent of channels, parameters or multiply-adds that remain if units stay."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    size = torch.cat([torch.full((g.n,), sum(g.widths)) for g in groups.prunable()] or [torch.zeros(0)])

    def amount(keep: Tensor) -> float:
        if kind == "channels":
            return float(size[keep].sum())
        return float(groups.macs(keep) if kind == "flops" else groups.numel(shapes, keep))

    whole = amount(groups.everything())
    return lambda keep: 100 * amount(keep) / whole if whole else 100.0


def latency_cost(model: nn.Module, groups: Groups, example_inputs: Inputs) -> Callable[[Tensor], float]:
    """Returns a function that gives the percent of an eval forward's time, measured in turns with the whole network."""

    def percent(keep: Tensor) -> float:
        if bool(keep.all()):
            return 100.0
        best = [math.inf, math.inf]
        for _ in range(REPEATS):
            best[0] = min(best[0], forward_ms(model, example_inputs))
            with untouched(model):
                cut(model, groups, keep, fresh=True)
                best[1] = min(best[1], forward_ms(model, example_inputs))
        return 100 * best[1] / best[0]

    return percent


def forward_ms(model: nn.Module, example_inputs: Inputs) -> float:
    """Measures the milliseconds of a forward in eval mode, the better of two after one to warm up."""
    args, kwargs = split_inputs(example_inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = []
    with untouched(model):
        for _ in range(3):
            started = time.perf_counter()
            model(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - started))
    return min(times[1:])


def total_rate(groups: Groups, keep: Tensor) -> float:
    """Returns the share of the channels of all groups that goes."""
    sizes: Sequence[int] = [sum(g.widths) for g in groups.prunable()]
    gone = [int((~keep[g.first : g.first + g.n]).sum()) for g in groups.prunable()]
    whole = sum(s * g.n for s, g in zip(sizes, groups.prunable(), strict=True))
    return sum(s * n for s, n in zip(sizes, gone, strict=True)) / whole if whole else 0.0
