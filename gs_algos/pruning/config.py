"""Defines the options that every pruning algorithm has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule
from gs_algos.pruning.budget import Budget


@dataclass(frozen=True)
class PruningConfig(AlgorithmConfig):
    """Options of every pruning algorithm.

    Args:
        rate: share of the units (channels, heads) that go from each group, in [0, 1).
        budget: what may remain, instead of a rate: `55% flops`, `40% params`, `50% channels`, `70% latency`; the
            smallest rate that meets it is taken.
        scope: `layer` cuts every group at the same rate, `global` takes the lowest scores of the whole network.
        round_to: every layer keeps a multiple of this many channels, or all; 8 or 16 suit hardware.
        floor: multiples of `round_to` channels that stay in every layer, whatever the budget.
        select_steps: optimizer steps before the cut is decided.
        reconstruct: keep the weights that go until the next step, so that `reconstruct` can refit what reads them.
        rules: `(pattern, {"rate": ...} | None)`, see `gs_algos.core.layer_rules`; None leaves a layer, and what is
            coupled with it, whole.
    """

    rate: float = 0.5
    budget: str | None = None
    scope: str = "layer"
    round_to: int = 1
    floor: int = 1
    select_steps: int = 0
    reconstruct: bool = False
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "Prune"

    def __post_init__(self) -> None:
        check_rate(self.who, self.rate)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"{self.who}: scope must be layer or global, got {self.scope!r}")
        for name, least in (("round_to", 1), ("floor", 1), ("select_steps", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{self.who}: {name} must be a whole number >= {least}, got {value!r}")
        if type(self.reconstruct) is not bool:
            raise ValueError(f"{self.who}: reconstruct must be True or False, got {self.reconstruct!r}")
        if self.budget is not None and Budget.parse(self.budget).kind == "latency" and self.scope == "global":
            raise ValueError(f"{self.who}: a latency budget needs scope='layer', got scope='global'; or budget flops")
        for rule in self.rules:
            if isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], dict) and "rate" in rule[1]:
                check_rate(f"{self.who}: rule {rule[0]}", rule[1]["rate"])


class PruneBaseOptions(TypedDict, total=False):
    """Types the fields of `PruningConfig` as keywords of every pruning algorithm, for type checkers."""

    rate: float
    budget: str | None
    scope: str
    round_to: int
    floor: int
    select_steps: int
    reconstruct: bool
    rules: Sequence[Rule]


def check_rate(who: str, rate: Any) -> None:
    """Raises ValueError unless `rate` is a number in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"{who}: rate must be in [0, 1), got {rate!r}{_as_share(rate)}")


def _as_share(rate: Any) -> str:
    """Returns `; use ...` with the share that a number of percents stands for, or ""."""
    text = rate.strip().removesuffix("%") if isinstance(rate, str) else rate
    try:
        number = float(text)
    except (TypeError, ValueError):
        return ""
    share = number if isinstance(rate, str) and "%" not in rate and number < 1 else number / 100
    return f"; use {share:g}" if not isinstance(rate, bool) and 0 < share < 1 and number != 1 else ""
