"""Holds what a search found: rules, what the network costs with them, and how else it could have been traded off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gs_algos.core.algorithm import Algorithm, share_resources
from gs_algos.core.layer_rules import Rule
from gs_algos.core.plan import render_layers
from gs_algos.core.table import Table
from gs_algos.search.problem import shown
from gs_algos.search.space import Setting

WHO = "search"


@dataclass(frozen=True)
class Point:
    """Is one network of the trade-off: its cost, its score if it was measured, and the sum of the scores of choices."""

    cost: float
    score: float | None
    predicted: float


@dataclass(frozen=True, eq=False)
class Policy:
    """Holds the answer of a search. `str()` shows it as a table, with the rules to paste below.

    Args:
        rules: of each algorithm, those of the search alone.
        setting: kind -> layer or group -> value.
        costs: kind of each limit -> what the network takes.
        limits: kind -> what it may take.
        before: kind -> what the float network takes.
        score: measured; the higher, the better. That of the float network is `baseline`.
        predicted: the sum of the scores of single choices.
        front: networks that were measured, by the first limit's cost: none is both dearer and worse than another.
        curve: networks of other budgets as the scores predict them.
        evaluated: policies that were measured for this search, and in how many seconds.
        notes: what there is to know beside.
    """

    rules: tuple[tuple[Rule, ...], ...]
    setting: Setting
    costs: Mapping[str, float]
    limits: Mapping[str, float]
    before: Mapping[str, float]
    score: float
    baseline: float
    predicted: float
    front: tuple[Point, ...]
    curve: tuple[Point, ...]
    evaluated: int
    seconds: float
    notes: tuple[str, ...] = ()
    _given: tuple[Algorithm, ...] = field(default=(), repr=False)
    _again: Callable[[str], Policy] | None = field(default=None, repr=False)

    def algorithms(self) -> list[Algorithm]:
        """Returns new algorithms like those that were given, with the rules of the search behind their own."""
        return [with_rules(algorithm, rules) for algorithm, rules in zip(self._given, self.rules, strict=True)]

    def within(self, budget: str) -> Policy:
        """Solves for another budget from the scores that are known, in a second: what `ilp` proposes, measured once.

        Raises:
            ValueError: if the budget cannot be met.
        """
        assert self._again is not None
        return self._again(budget)

    def table(self) -> Table:
        rows = []
        for kind, own in self.setting.items():
            rows += [(site, kind, str(value)) for site, value in own.items()]
        counts = Counter((kind, value) for _, kind, value in rows)
        what = ", ".join(f"{count} x {kind} {value}" for (kind, value), count in counts.items())
        cost = "; ".join(
            f"{shown(amount, kind)}, {100 * amount / self.before[kind]:.1f} % of the float network"
            for kind, amount in self.costs.items()
        )
        measured = f"{self.evaluated} policies measured, {self.seconds:.1f} s"
        below = [
            what,
            cost,
            f"score {self.score:.6g}, of the float network {self.baseline:.6g}; {measured}",
            *(f"note: {note}" for note in self.notes),
            *(f"{a.name}: rules={list(r)!r}" for a, r in zip(self._given, self.rules, strict=True)),
        ]
        return render_layers(("layer", "knob", "value"), rows, WHO, below)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def with_rules(algorithm: Algorithm, rules: Sequence[Rule]) -> Algorithm:
    """Returns a new algorithm of the same options, with more rules behind its own."""
    options: Any = algorithm.config
    cls: Any = type(algorithm)
    new: Algorithm = cls(replace(options, rules=(*options.rules, *rules)))
    share_resources(algorithm, new)
    return new
