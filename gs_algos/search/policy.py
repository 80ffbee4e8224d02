"""Holds what a search found: rules, what the network costs with them, and how else it could have been traded off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gs_algos.analysis.report.page import Report
from gs_algos.analysis.report.trade_off import TradeOff
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
    predicted: float | None


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
        predicted: the sum of the scores of single choices; None if the agent asked for none.
        front: networks that were measured, by the first limit's cost: none is both dearer and worse than another.
        curve: networks of other budgets as the scores predict them.
        evaluated: policies that were measured for this search, and in how many seconds.
        notes: what there is to know beside.
        by_divergence: whether scores are minus the KL divergence from the float network.
    """

    rules: tuple[tuple[Rule, ...], ...]
    setting: Setting
    costs: Mapping[str, float]
    limits: Mapping[str, float]
    before: Mapping[str, float]
    score: float
    baseline: float
    predicted: float | None
    front: tuple[Point, ...]
    curve: tuple[Point, ...]
    evaluated: int
    seconds: float
    notes: tuple[str, ...] = ()
    by_divergence: bool = True
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

    def noting(self, note: str) -> Policy:
        """Returns the policy with another note."""
        return replace(self, notes=(*self.notes, note))

    def recipe_lines(self) -> list[str]:
        """Returns for each algorithm the line of a TOML recipe that gives it these rules."""
        return [f"options = {{ rules = {_toml(rules)} }}" for rules in self.rules]

    def report(self, title: str) -> Report:
        """Returns a page with the networks between cost and quality, and the rules."""
        kind = next(iter(self.costs))
        lost = "KL divergence in nats" if self.by_divergence else "loss of score"
        shown_of = {"latency": "ms"}
        found = TradeOff(
            unit=shown_of.get(kind, kind),
            before=self.before[kind],
            most=self.limits[kind],
            loss=lost,
            chosen=(self.costs[kind], self.baseline - self.score),
            front=[(p.cost, self.baseline - p.score) for p in self.front if p.score is not None],
            predicted=[(p.cost, p.predicted) for p in self.curve if p.predicted is not None]
            if self.by_divergence
            else (),
            rules=[f"{a.name}: rules={list(r)!r}" for a, r in zip(self._given, self.rules, strict=True)],
        )
        return Report(title, trade_off=found, notes=self.notes)

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


def _toml(value: Any) -> str:
    """Writes plain values as TOML; None is the word "none", as in recipes."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str) or value is None:
        return f"'{'none' if value is None else value}'"  # a literal string, in which a backslash is one
    return repr(value)


def with_rules(algorithm: Algorithm, rules: Sequence[Rule]) -> Algorithm:
    """Returns a new algorithm of the same options, with more rules behind its own."""
    options: Any = algorithm.config
    cls: Any = type(algorithm)
    new: Algorithm = cls(replace(options, rules=(*options.rules, *rules)))
    share_resources(algorithm, new)
    return new
