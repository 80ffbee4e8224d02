"""Sums products of columns in the shortest torch that says it."""

from __future__ import annotations

from torch import Tensor


def gram_ref(total: Tensor, x: Tensor, floats: Tensor | None = None) -> Tensor:
    """Returns the sum that `gram_` leaves in total `[groups, K, K]`, of x and floats `[groups, T, K]`."""
    left = x.float()
    if floats is not None:
        left = (floats.float() - x.float()).to(x.dtype).float()
    return total + left.mT @ x.float()
