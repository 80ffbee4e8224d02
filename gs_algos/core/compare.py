"""Measures how far a compressed network's output is from the one it stands for."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns the RMS of the difference over RMS of `want`; an output that is all zeros counts as one of RMS 1."""
    got, want = got.double(), want.double()
    size = want.square().mean().sqrt()
    error = (got - want).square().mean().sqrt() / torch.where(size > 0, size, 1.0)
    return float(error) if bool(error.isfinite()) else float("inf")
