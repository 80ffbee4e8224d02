"""The exact choice of one option for each item."""

from __future__ import annotations

import itertools
import random

import pytest

from gs_algos.search import knapsack as module
from gs_algos.search.knapsack import knapsack


def exhaustive(scores, costs, budget) -> float:
    options = [range(len(row)) for row in scores]
    sums = (
        sum(row[i] for row, i in zip(scores, picks, strict=True))
        for picks in itertools.product(*options)
        if sum(row[i] for row, i in zip(costs, picks, strict=True)) <= budget
    )
    return min(sums)


def items(seed: int, count: int = 6) -> tuple[list[list[float]], list[list[int]]]:
    draw = random.Random(seed)
    widths = [draw.randint(1, 4) for _ in range(count)]
    return [[draw.random() for _ in range(n)] for n in widths], [
        [draw.randint(0, 50) for _ in range(n)] for n in widths
    ]


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_the_best_of_all(seed: int):
    scores, costs = items(seed)
    budget = sum(min(row) for row in costs) + 40
    picks = knapsack(scores, costs, budget)
    assert sum(row[i] for row, i in zip(costs, picks, strict=True)) <= budget
    assert sum(row[i] for row, i in zip(scores, picks, strict=True)) == pytest.approx(exhaustive(scores, costs, budget))


def test_a_coarse_budget_is_kept_and_what_is_left_is_spent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PARTS", 4)  # costs of 33 and 67 are rounded up to 50 and 75 of 100
    assert knapsack([[1.0, 0.0], [1.0, 0.0]], [[0, 33], [0, 67]], 100) == [1, 1]


def test_the_budget_of_the_cheapest_options_has_one_solution():
    assert knapsack([[0.0, 9.0], [0.0, 9.0]], [[7, 3], [5, 2]], 5) == [1, 1]


def test_a_budget_below_that_is_refused():
    with pytest.raises(ValueError, match="at least 5, the cheapest options, got 4"):
        knapsack([[0.0, 9.0], [0.0, 9.0]], [[7, 3], [5, 2]], 4)


def test_an_item_without_options_is_refused():
    with pytest.raises(ValueError, match="every item must have options"):
        knapsack([[]], [[]], 4)
