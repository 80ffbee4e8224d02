"""Puts knobs, limits and scores together: the problem that an agent is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from gs_algos.analysis.layers import some_of
from gs_algos.search.budget import Budget
from gs_algos.search.cost import Costs
from gs_algos.search.kinds import Value
from gs_algos.search.knapsack import knapsack
from gs_algos.search.space import Knob, LayerCall, Picks, Space

Scores = Mapping[str, Mapping[Value, float]]  # name of a knob -> value -> what it costs in quality, alone; 0 is nothing
HALVINGS = 30  # of the multiplier of a second limit


@dataclass(frozen=True)
class Limit:
    """Says how much of one kind of cost a network may take. text: the budget, as the user wrote it."""

    kind: str
    most: float
    text: str


@dataclass(frozen=True, eq=False)
class Problem:
    """Holds what an agent needs to propose picks.

    Args:
        space: the knobs. A value that another one with more left of the network is no dearer than is not among theirs.
        limits: one or two.
        scores_of: gives the scores of all values; measured when it is first called.
        evaluations: how many policies an agent may propose in all.
        network: the float one. It is for reading only.
        calls: of its layers, in the order they run.
        baseline: score of the float network.
    """

    space: Space
    limits: tuple[Limit, ...]
    costs: Costs
    scores_of: Callable[[], Scores]
    evaluations: int
    seed: int
    network: nn.Module
    calls: Mapping[str, LayerCall]
    baseline: float = 0.0
    _totals: dict[tuple[str, Picks], float] = field(default_factory=dict)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self.space.knobs

    def total(self, picks: Picks, kind: str) -> float:
        """Returns a cost of the whole network."""
        if (kind, picks) not in self._totals:
            if kind in self._tables:
                base, parts = self._tables[kind]
                found = base + sum(part[pick] for part, pick in zip(parts, picks, strict=True))
            else:
                found = self.costs.total(kind, self.space.setting(picks))
            self._totals[kind, picks] = found
        return self._totals[kind, picks]

    def excess(self, picks: Picks) -> list[float]:
        """Returns the share by which each limit is exceeded; at most 0 where it is kept."""
        return [self.total(picks, limit.kind) / limit.most - 1 for limit in self.limits]

    def fits(self, picks: Picks) -> bool:
        return max(self.excess(picks)) <= 1e-9

    @property
    def least(self) -> Picks:
        """Returns the picks that leave least of the network."""
        return (0,) * len(self.knobs)

    @property
    def most(self) -> Picks:
        """Returns the picks that leave most of the network."""
        return tuple(len(knob.values) - 1 for knob in self.knobs)

    @cached_property
    def scores(self) -> list[list[float]]:
        """Returns for each knob the score of each of its values, lower is better."""
        scores = self.scores_of()
        return [[scores[knob.name][value] for value in knob.values] for knob in self.knobs]

    @property
    def scored(self) -> bool:
        """Says whether the scores have been measured: an agent that asks for none is not to pay for them."""
        return "scores" in self.__dict__

    def predicted(self, picks: Picks) -> float:
        """Returns the sum of the scores."""
        return sum(scores[pick] for scores, pick in zip(self.scores, picks, strict=True))

    def additive(self, kind: str) -> bool:
        """Says whether a cost is a sum over knobs."""
        return kind in self._tables

    @cached_property
    def _tables(self) -> dict[str, tuple[float, list[list[float]]]]:
        """Returns kind of cost -> what the least picks cost, and for each knob what each value adds; if it is a sum."""
        return {limit.kind: table for limit in self.limits if (table := tables_of(self, limit.kind)) is not None}

    @cached_property
    def least_that_fits(self) -> Picks | None:
        """Returns picks within all limits, those that leave least; None if there are none.

        With two limits the cheapest values of one may be dear for the other: their shares are weighed until both fit.
        """
        starts = [self.least, *(self.cheapest(limit.kind) for limit in self.limits)]
        if len(self.limits) == 2:
            first, second = self.limits
            for step in range(1, 16):
                share = step / 16
                weigh = {first.kind: share / first.most, second.kind: (1 - share) / second.most}
                starts.append(tuple(self._cheapest(i, weigh) for i in range(len(self.knobs))))
        return next((picks for picks in starts if self.fits(picks)), None)

    def cheapest(self, kind: str) -> Picks:
        """Returns the picks each of which costs least alone."""
        return tuple(self._cheapest(place, {kind: 1.0}) for place in range(len(self.knobs)))

    def fits_alone(self, limit: Limit) -> bool:
        """Says whether a limit could be kept if there were no other."""
        return min(self.total(picks, limit.kind) for picks in (self.least, self.cheapest(limit.kind))) <= limit.most

    def _cheapest(self, place: int, weigh: Mapping[str, float]) -> int:
        def cost(pick: int) -> float:
            picks = with_pick(self.least, place, pick)
            return sum(weight * self.total(picks, kind) for kind, weight in weigh.items())

        return min(range(len(self.knobs[place].values)), key=cost)

    def solved(self) -> Picks:
        """Returns the picks with the least sum of scores within the limits, exactly where the costs are sums.

        One limit: `knapsack`. Two: the scores plus a multiple of the second cost, found by bisection. Costs that are no
        sums are the business of agents.

        Raises:
            ValueError: if a cost is no sum, or no picks fit.
        """
        if not all(self.additive(limit.kind) for limit in self.limits):
            raise ValueError("solved: costs must be sums over knobs")
        if self.least_that_fits is None:
            raise ValueError("solved: some picks must fit")
        picks = self._knapsack(self.scores)
        if len(self.limits) == 1 or self.fits(picks):
            return picks
        second = self.limits[1]
        adds = [[part / second.most for part in parts] for parts in self._tables[second.kind][1]]
        low, high, best = 0.0, max(1.0, self.predicted(self.least)), self.least_that_fits
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            pairs = zip(self.scores, adds, strict=True)
            picks = self._knapsack([[s + middle * a for s, a in zip(x, y, strict=True)] for x, y in pairs])
            if self.fits(picks):
                high = middle
                best = min(best, picks, key=self.predicted)
            else:
                low = middle
        return best

    def _knapsack(self, scores: Sequence[Sequence[float]]) -> Picks:
        limit = self.limits[0]
        base, parts = self._tables[limit.kind]
        scale = 1 if limit.kind != "latency" else 10**6  # whole nanoseconds
        lows = [min(part) for part in parts]
        costs = [[round(scale * (x - low)) for x in part] for part, low in zip(parts, lows, strict=True)]
        return tuple(knapsack(scores, costs, int(scale * (limit.most - base - sum(lows)) + 1e-6)))


def tables_of(problem: Problem, kind: str) -> tuple[float, list[list[float]]] | None:
    """Returns what the least picks cost and what each value adds; None if a cost is no sum over knobs."""
    space, costs = problem.space, problem.costs

    def total(picks: Picks) -> float:
        return costs.total(kind, space.setting(picks))

    base = total(problem.least)
    parts = [
        [total(with_pick(problem.least, i, pick)) - base for pick in range(len(knob.values))]
        for i, knob in enumerate(space.knobs)
    ]
    for picks in (problem.most, tuple(pick // 2 for pick in problem.most), *_mixed(problem.most)):
        predicted = base + sum(part[pick] for part, pick in zip(parts, picks, strict=True))
        if abs(predicted - total(picks)) > 1e-6 * max(1.0, abs(base)):
            return None
    return base, parts


def _mixed(most: Picks) -> list[Picks]:
    """Returns picks in which neighbours differ."""
    return [tuple(m if i % n else 0 for i, m in enumerate(most)) for n in (2, 3)]


def with_pick(picks: Picks, place: int, pick: int) -> Picks:
    return (*picks[:place], pick, *picks[place + 1 :])


def refuse_untimed(budgets: Sequence[Budget], space: Space, who: str) -> None:
    """Raises ValueError for a budget of latency where knobs change the sizes of layers, which no table of times has."""
    for budget in budgets:
        if budget.kind == "latency" and (sized := _sized(space)):
            raise ValueError(
                f"{who}: a budget of latency must be for knobs of weights and inputs, got {budget} for knobs of "
                f"{sized}; give a budget of macs, and measure the network that it gives"
            )


def _sized(space: Space) -> str:
    """Returns the kind of a knob that changes the sizes of layers; "" if there is none."""
    return next((knob.kind for knob in space.knobs if knob.kind not in ("weight", "act")), "")


def limits_of(budgets: Sequence[Budget], space: Space, costs: Costs, who: str) -> tuple[Limit, ...]:
    """Returns the limits that budgets set on a network.

    Raises:
        ValueError: if the kind of a budget is one that no knob changes.
    """
    limits = []
    least = (0,) * len(space.knobs)
    raised = [with_pick(least, place, len(knob.values) - 1) for place, knob in enumerate(space.knobs)]
    for budget in budgets:
        ends = [costs.total(budget.kind, space.setting(picks)) for picks in (least, *raised)]
        if max(ends) <= min(ends):
            kinds = ", ".join(dict.fromkeys(knob.kind for knob in space.knobs))
            raise ValueError(
                f"{who}: a budget must be of a cost that the knobs change, got {budget} for knobs of {kinds}, which "
                f"leave it at {shown(ends[0], budget.kind)}"
            )
        before = costs.before(budget.kind)
        weights = [knob.site for knob in space.knobs if knob.kind == "weight"]
        if budget.unit == "bits":
            if _sized(space) or not weights:
                raise ValueError(f"{who}: a budget of bits must be for knobs of weights alone, got {budget}")
            setting = space.setting(least)
            inside = {"weight": {site: setting["weight"][site] for site in weights}}
            others = costs.total("bytes", setting) - costs.weight_bytes(inside)
            most_of = budget.of(before, costs.numbers(weights), others)
        else:
            most_of = budget.of(before)
        limits.append(Limit(budget.kind, most_of, str(budget)))
    return tuple(limits)


def shown(amount: float, kind: str) -> str:
    """Returns a cost with its unit, as a person reads it."""
    words = {"bytes": "bytes", "params": "parameters", "macs": "multiply-adds", "bops": "bit operations"}
    return f"{amount:.4g} ms" if kind == "latency" else f"{round(amount):,} {words[kind]}"


def reduced(space: Space, costs: Costs, limits: Sequence[Limit]) -> tuple[Space, tuple[str, ...]]:
    """Leaves out values that cost no less than one with more left of the network, and knobs with one value left.

    Returns:
        The space, and what was left out, in words.
    """
    knobs: list[Knob] = []
    gone: dict[str, list[str]] = defaultdict(list)
    fixed = {kind: dict(values) for kind, values in space.fixed.items()}
    given = [{kind: dict(values) for kind, values in one.items()} for one in space.given]
    least = (0,) * len(space.knobs)
    for place, knob in enumerate(space.knobs):
        settings = [space.setting(with_pick(least, place, pick)) for pick in range(len(knob.values))]
        costs_of = [[costs.total(limit.kind, setting) for limit in limits] for setting in settings]
        left = [
            pick
            for pick, own in enumerate(costs_of)
            if not any(all(o <= c for o, c in zip(other, own, strict=True)) for other in costs_of[pick + 1 :])
        ]
        values = tuple(knob.values[pick] for pick in left)
        if len(values) > 1:
            knobs.append(replace(knob, values=values))
        else:
            fixed[knob.kind][knob.site] = given[knob.target][knob.kind][knob.site] = values[0]
        if len(left) < len(knob.values):
            out = ", ".join(str(knob.values[pick]) for pick in range(len(knob.values)) if pick not in left)
            kinds = " and ".join(limit.kind for limit in limits)
            only = "" if len(values) > 1 else ", which it has, without a knob"
            gone[f"cannot save {kinds} by {out} beside {values[0]}{only}"].append(knob.name)
    notes = tuple(f"{some_of(names)} {what}" for what, names in gone.items())
    return Space(tuple(knobs), fixed, tuple(given), space.notes), notes
