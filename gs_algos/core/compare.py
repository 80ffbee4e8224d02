"""Measures the error of a compressed network: its outputs against those of the network it was made from."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns `rms(got - want) / rms(want)`, with a divisor of 1 if `want` is all zeros; inf if it is not finite.

    Tensors without elements agree: 0.
    """
    if want.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    size = want.square().mean().sqrt()
    error = (got - want).square().mean().sqrt() / torch.where(size > 0, size, 1.0)
    return float(error) if bool(error.isfinite()) else float("inf")
