"""Sums products of columns in the shortest torch that says it."""

from __future__ import annotations

from torch import Tensor


def gram_ref(total: Tensor, x: Tensor, floats: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Returns the sum that `gram_` leaves in total `[groups, K, K]`, of x and floats `[groups, T, K]`."""
    rows = x if mask is None else x[:, mask]
    left = rows.float()
    if floats is not None:
        other = floats if mask is None else floats[:, mask]
        left = (other.float() - rows.float()).to(x.dtype).float()
    return total + left.mT @ rows.float()
