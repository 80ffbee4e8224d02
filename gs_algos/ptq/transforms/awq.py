"""Scales up the weights that large activations meet, so that they are rounded more finely than the others.

AWQ: Lin et al. 2023, arXiv:2306.00978. Differs from the paper: with and without the share of the weights, as its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.ptq.transforms.columns import StageColumns

POWERS = 20
SMALLEST = 1e-4


def awq(columns: StageColumns, _: float | None) -> dict[str, Tensor]:
    """Returns the scales of 20 powers, each by the activations alone and by the weights too."""
    share = columns.weight_share
    found: dict[str, Tensor] = {}
    for r in [(i + 1) / POWERS for i in range(POWERS)]:
        found[f"{r:g}"] = awq_scale(columns.absmean, r)
        found[f"{r:g} by weights"] = awq_scale(columns.absmean, r, share)
    return found


def awq_scale(absmean: Tensor, r: float, share: Tensor | None = None) -> Tensor:
    """Computes `mean|x|^r`, or that over `share^(1 - r) + 1e-4`, `[K]`, over `sqrt(max * min)`; 1 where x is always 0.

    Args:
        share: `[K]`, mean of |w| over the largest weight of its group.
    """
    scale = absmean**r
    if share is not None:
        scale = scale / (share ** (1 - r) + SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    alive = absmean > 0
    if not bool(alive.any()):
        return torch.ones_like(absmean)
    middle = (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale / middle, 1.0)
