"""Proposes the picks whose scores, added up, are least; then tries small exchanges for real.

Costs that are sums over knobs: an exact knapsack. Others, such as multiply-adds of a pruned network: what a greedy
descent and a common threshold of the scores give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gs_algos.search.agent import Evaluated
from gs_algos.search.problem import Problem, with_pick
from gs_algos.search.space import Picks

AT_ONCE = 8  # exchanges that are tried together
PATIENCE = 6  # times that no exchange helps, after which it stops
ROUNDS = 200  # of exchanges by predicted scores


class ILP:
    """Proposes solutions of the predicted problem, then exchanges of two knobs around the best."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best: Evaluated | None = None
        self.tried: set[Picks] = set()
        self.idle = 0

    def propose(self) -> list[Picks]:
        if self.best is None:
            found = first_picks(self.problem)
        else:
            found = self._exchanges(self.best.picks) if self.idle < PATIENCE else []
        self.tried.update(found)
        return found

    def _exchanges(self, picks: Picks) -> list[Picks]:
        """Returns the exchanges that were not tried and are predicted to be best."""
        near = sorted({one for one in neighbours(self.problem, picks) if one not in self.tried}, key=self._order)
        found: dict[Picks, None] = {}
        for one in near:
            self.tried.add(one)
            full = refilled(self.problem, one)
            if full == one or full not in self.tried:
                found[full] = None
            if len(found) == AT_ONCE:
                break
        return list(found)

    def _order(self, picks: Picks) -> tuple[float, Picks]:
        return self.problem.predicted(picks), picks

    def observe(self, found: Sequence[Evaluated]) -> None:
        self.tried.update(one.picks for one in found)
        best = max(found, key=lambda one: one.score)
        if self.best is None or best.score > self.best.score:
            self.best, self.idle = best, 0
        else:
            self.idle += 1


def first_picks(problem: Problem) -> list[Picks]:
    """Returns picks that fit: the exact solution, or those of the greedy and the threshold form, the better first."""
    if all(problem.additive(limit.kind) for limit in problem.limits):
        return [problem.solved()]
    found = {swapped(problem, refilled(problem, picks)) for picks in (greedy(problem), threshold(problem))}
    return sorted(found, key=lambda picks: (problem.predicted(picks), picks))


def greedy(problem: Problem) -> Picks:
    """Lowers, from the picks that leave most, what adds least to the scores for what it saves, until all fit."""
    found = next((picks for picks in _descent(problem) if problem.fits(picks)), problem.least_that_fits)
    assert found is not None
    return found


def greedy_path(problem: Problem) -> list[Picks]:
    """Returns what the greedy descent passes, from the picks that leave most to those that leave least."""
    return list(_descent(problem))


def _descent(problem: Problem) -> Iterator[Picks]:
    picks = problem.most
    while True:
        yield picks
        excess = problem.excess(picks)
        kind = problem.limits[excess.index(max(excess))].kind
        before = problem.total(picks, kind)
        options = []
        for place, pick in enumerate(picks):
            for lower in range(pick):
                saved = before - problem.total(with_pick(picks, place, lower), kind)
                if saved > 0:
                    added = problem.scores[place][lower] - problem.scores[place][pick]
                    options.append((added / saved, place, lower))
        if not options:
            return
        _, place, lower = min(options)
        picks = with_pick(picks, place, lower)


def threshold(problem: Problem) -> Picks:
    """Gives each knob the value that leaves least with a score of at most t, for the smallest t with which all fit.

    The score of a value counts as at least that of every value that leaves more, so that more is lowered as t rises.
    """
    falling = []
    for own in problem.scores:
        highest, row = -float("inf"), []
        for score in reversed(own):
            highest = max(highest, score)
            row.append(highest)
        falling.append(row[::-1])

    def at(t: float) -> Picks:
        return tuple(next((i for i, s in enumerate(row) if s <= t), len(row) - 1) for row in falling)

    levels = sorted({score for row in falling for score in row})
    low, high = 0, len(levels) - 1
    if not problem.fits(at(levels[high])):
        assert problem.least_that_fits is not None
        return problem.least_that_fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.fits(at(levels[middle])) else (middle + 1, high)
    return at(levels[low])


def refilled(problem: Problem, picks: Picks) -> Picks:
    """Raises, one after the other, the knob that saves most of the scores, as long as all limits are kept."""
    while True:
        gains = [(gain, more) for gain, more in _raises(problem, picks) if problem.fits(more)]
        if not gains:
            return picks
        picks = max(gains)[1]


def swapped(problem: Problem, picks: Picks) -> Picks:
    """Exchanges knobs as long as that lowers the sum of the scores."""
    for _ in range(ROUNDS):
        better = min(neighbours(problem, picks), key=problem.predicted, default=picks)
        if not problem.predicted(better) < problem.predicted(picks) - 1e-12:
            break
        picks = better
    return picks


def neighbours(problem: Problem, picks: Picks) -> list[Picks]:
    """Returns picks with one knob raised, and another one lowered as far as that needs, or two where costs are sums."""
    pairs = all(problem.additive(limit.kind) for limit in problem.limits)
    found = []
    for place, pick in enumerate(picks):
        if pick + 1 == len(problem.knobs[place].values):
            continue
        more = with_pick(picks, place, pick + 1)
        if problem.fits(more):
            found.append(more)
            continue
        others = [other for other in range(len(picks)) if other != place and picks[other]]
        for number, other in enumerate(others):
            lowered = next((one for one in _lower(more, other) if problem.fits(one)), None)
            if lowered is not None:
                found.append(lowered)
            elif pairs:
                both = (one for third in others[:number] for one in _lower(_lower(more, other)[-1], third)[:1])
                found += [one for one in both if problem.fits(one)]
    return found


def _lower(picks: Picks, place: int) -> list[Picks]:
    """Returns picks with one knob lowered by one value, by two, and so on."""
    return [with_pick(picks, place, pick) for pick in reversed(range(picks[place]))]


def _raises(problem: Problem, picks: Picks) -> list[tuple[float, Picks]]:
    """Returns what each value above a knob's own saves of the scores, with the picks."""
    return [
        (problem.scores[place][pick] - problem.scores[place][more], with_pick(picks, place, more))
        for place, pick in enumerate(picks)
        for more in range(pick + 1, len(problem.knobs[place].values))
        if problem.scores[place][more] < problem.scores[place][pick]
    ]
