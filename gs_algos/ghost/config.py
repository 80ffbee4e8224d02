"""Defines the options of Ghost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule


@dataclass(frozen=True)
class GhostConfig(AlgorithmConfig):
    """Options of Ghost.

    Args:
        ratio: channels that are made of one, itself among them: 2 computes half of them, 3 a third.
        kernel: side of the depthwise convolutions that make the others, odd.
        fit: choose the channels that the others follow from, and start at the least squared error; False starts at
            random weights, as for a network that is trained from the beginning.
        force: replace layers also where that makes them slower, as measured.
        rules: `(pattern, {"ratio": ..., "kernel": ...} | None)`, see `gs_algos.core.layer_rules`; None leaves
            the layer.
    """

    ratio: int = 2
    kernel: int = 3
    fit: bool = True
    force: bool = False
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "Ghost"

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.who)
        check_kernel(self.kernel, self.who)
        for name in ("fit", "force"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Ghost: {name} must be True or False, got {getattr(self, name)!r}")
        for rule in self.rules:
            values = rule[1] if isinstance(rule, tuple | list) and len(rule) == 2 else None
            for name, check in (("ratio", check_ratio), ("kernel", check_kernel)):
                if isinstance(values, dict) and name in values:
                    check(values[name], f"Ghost: rule {rule[0]!r}")

    def defaults(self) -> dict[str, Any]:
        """Returns what a rule may set, with the values where no rule does."""
        return {"ratio": self.ratio, "kernel": self.kernel}


def check_ratio(ratio: Any, who: str) -> None:
    if type(ratio) is not int or ratio < 2:
        raise ValueError(f"{who}: ratio must be a whole number >= 2, got {ratio!r}")


def check_kernel(kernel: Any, who: str) -> None:
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{who}: kernel must be an odd number >= 1, got {kernel!r}")


class GhostOptions(TypedDict, total=False):
    """Types the fields of `GhostConfig` as keywords of `Ghost`, for type checkers."""

    ratio: int
    kernel: int
    fit: bool
    force: bool
    rules: Sequence[Rule]
