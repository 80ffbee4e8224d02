"""Rules for the numbers in a module's tensors, checked before a checkpoint fills the module.

A module that has such rules says them in a method `state_rules`, by the names of its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Must:
    """Holds one rule: `be <words>`, and the elements of a tensor for which it holds, bool of the tensor's shape."""

    words: str
    holds: Callable[[Tensor], Tensor]


Rules = Mapping[str, Must]
FINITE = Must("finite", torch.isfinite)
POSITIVE = Must("finite and > 0", lambda t: t.isfinite() & (t > 0))
NOT_NEGATIVE = Must("finite and >= 0", lambda t: t.isfinite() & (t >= 0))

NOT_ZERO = Must("finite and not 0", lambda t: t.isfinite() & (t != 0))


def whole_within(low: float, high: float) -> Must:
    """Requires a whole number, or a half as grids of two levels have it, from low to high."""
    return Must(f"whole, or a half, in {low:g}..{high:g}", lambda t: ((2 * t) % 1 == 0) & (t >= low) & (t <= high))


def equal_to(wanted: Tensor) -> Must:
    """Requires the values that follow from the module's options."""
    return Must("what the options say", lambda t: t == wanted.to(t.device))


def refuse_values(model: nn.Module, state: Mapping[str, Tensor], who: str) -> None:
    """Raises unless the state holds numbers that the model's modules can have.

    Raises:
        ValueError: with the first tensor that breaks a rule, the rule, and the value.
    """
    for name, module in model.named_modules():
        rules: Rules = module.state_rules() if hasattr(module, "state_rules") else {}  # type: ignore[operator]
        for part, must in rules.items():
            key = f"{name}.{part}" if name else part
            tensor = state.get(key)
            if tensor is not None and tensor.is_floating_point() and tensor.itemsize == 1:
                tensor = tensor.float()  # floats of 8 bits have no comparisons
            if tensor is None or tensor.is_meta or bool((right := must.holds(tensor)).all()):
                continue
            at = (~right).nonzero()[0].tolist()
            raise ValueError(f"{who}: {key} must be {must.words}, got {tensor[tuple(at)].item()} at {at}")
