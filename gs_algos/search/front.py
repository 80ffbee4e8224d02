"""Finds what other networks there are between cost and quality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gs_algos.search.agent import Evaluated
from gs_algos.search.ilp import greedy_path
from gs_algos.search.policy import Point
from gs_algos.search.problem import Limit, Problem
from gs_algos.search.space import Picks

POINTS = 12  # of the predicted curve


def front_of(problem: Problem, found: Iterable[Evaluated]) -> tuple[Point, ...]:
    """Returns those of the evaluated networks that no other is both cheaper and better than, by rising cost."""
    kind = problem.limits[0].kind
    predicted = problem.predicted if problem.scored else lambda picks: None
    points = sorted(
        (Point(problem.total(one.picks, kind), one.score, predicted(one.picks)) for one in found),
        key=lambda point: (point.cost, -_score(point)),
    )
    front: list[Point] = []
    for point in points:
        if not front or _score(point) > _score(front[-1]):
            front.append(point)
    return tuple(front)


def curve_of(problem: Problem) -> tuple[Point, ...]:
    """Returns the networks that the scores predict to be best at other budgets of the first kind, by rising cost."""
    kind = problem.limits[0].kind
    if problem.additive(kind):
        low, high = problem.total(problem.least, kind), problem.total(problem.most, kind)
        budgets = [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]
        picks = [replace(problem, limits=(Limit(kind, most, ""),)).solved() for most in budgets]
    else:
        path = greedy_path(problem)
        picks = path[:: max(1, len(path) // POINTS)]
    return tuple(sorted((_point(problem, one, kind) for one in set(picks)), key=lambda point: point.cost))


def _point(problem: Problem, picks: Picks, kind: str) -> Point:
    return Point(problem.total(picks, kind), None, problem.predicted(picks))


def _score(point: Point) -> float:
    assert point.score is not None
    return point.score
