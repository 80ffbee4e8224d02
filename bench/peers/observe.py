"""Calls other providers of ranges, for the benchmark: each takes the arguments of `minmax`."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.formats import Granularity


def aminmax(x: Tensor, *, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Calls torch's own, for the whole tensor."""
    low, high = torch.aminmax(x)
    return low.float().view(1), high.float().view(1)
