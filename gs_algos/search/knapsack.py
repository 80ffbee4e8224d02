"""Chooses one of several options for each item so that the sum of scores is least and the costs fit a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

PARTS = 2**16  # that the budget is divided into


def knapsack(scores: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Returns the option of each item with the least sum of scores among those whose costs sum to at most `budget`.

    Multiple-choice knapsack by dynamic programming. Exact where what the cheapest options leave of the budget is at
    most 65,536 units, a unit being the greatest that divides all costs; otherwise costs count in 65,536ths of it, each
    rounded up, and what that leaves over is spent item by item.

    Args:
        scores: of each option of each item; lower is better.
        costs: whole numbers >= 0, of the same shape.
        budget: of all items together.

    Raises:
        ValueError: if even the cheapest options cost more than the budget, or an item has no option.
    """
    if any(not options for options in costs) or [len(s) for s in scores] != [len(c) for c in costs]:
        raise ValueError("knapsack: every item must have options, each with a score and a cost")
    least = [min(options) for options in costs]
    slack = budget - sum(least)
    if slack < 0:
        raise ValueError(f"knapsack: the budget must be at least {sum(least):,}, the cheapest options, got {budget:,}")
    over = [[cost - low for cost in options] for options, low in zip(costs, least, strict=True)]
    unit = max(1, math.gcd(*(cost for options in over for cost in options)), math.ceil(slack / PARTS))
    size = slack // unit
    best = np.zeros(size + 1)  # least sum of scores of the items so far, that cost at most so many units
    chosen = np.zeros((len(costs), size + 1), dtype=np.int16)
    for item, options in enumerate(over):
        tried = np.full((len(options), size + 1), np.inf)
        for option, cost in enumerate(options):
            units = -(-cost // unit)
            if units <= size:
                tried[option, units:] = best[: size + 1 - units] + scores[item][option]
        chosen[item] = tried.argmin(0)
        best = tried.min(0)
    picks, left = [0] * len(costs), size
    for item in reversed(range(len(costs))):
        picks[item] = int(chosen[item, left])
        left -= -(-over[item][picks[item]] // unit)
    return _spent(scores, over, picks, slack - sum(over[item][pick] for item, pick in enumerate(picks)))


def _spent(scores: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], picks: list[int], left: int) -> list[int]:
    """Returns the picks with what is left of the budget spent: the best exchange of one option first."""
    while True:
        gains = [
            (scores[item][pick] - score, item, option)
            for item, pick in enumerate(picks)
            for option, score in enumerate(scores[item])
            if score < scores[item][pick] and costs[item][option] - costs[item][pick] <= left
        ]
        if not gains:
            return picks
        _, item, option = max(gains)
        left -= costs[item][option] - costs[item][picks[item]]
        picks[item] = option
