"""Defines the options of Adder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule

STARTS = ("normal", "float")


@dataclass(frozen=True)
class AdderConfig(AlgorithmConfig):
    """Options of Adder.

    Args:
        start: `normal` draws weights from N(0, 1); `float` takes those of the network, scaled to a standard deviation
            of 1, which is about that of what a layer sees behind batch norms.
        eta: the gradient of a layer's weight is scaled to a norm of `eta * sqrt(numel)`, before weight decay.
        int8: train with inputs and weights rounded to one 8-bit grid a layer, and convert to 8-bit codes.
        rules: `(pattern, {"eta": ...} | None)`, see `gs_algos.core.layer_rules`; None leaves the layer a convolution.
    """

    start: str = "normal"
    eta: float = 0.2
    int8: bool = False
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "Adder"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"Adder: start must be {' or '.join(STARTS)}, got {self.start!r}")
        check_eta(self.eta, "Adder")
        if not isinstance(self.int8, bool):
            raise ValueError(f"Adder: int8 must be True or False, got {self.int8!r}")
        for rule in self.rules:
            values = rule[1] if isinstance(rule, tuple | list) and len(rule) == 2 else None
            if isinstance(values, dict) and "eta" in values:
                check_eta(values["eta"], f"Adder: rule {rule[0]!r}")


def check_eta(eta: Any, who: str) -> None:
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 < eta < math.inf:
        raise ValueError(f"{who}: eta must be a number > 0, got {eta!r}")


class AdderOptions(TypedDict, total=False):
    """Types the fields of `AdderConfig` as keywords of `Adder`, for type checkers."""

    start: str
    eta: float
    int8: bool
    rules: Sequence[Rule]
