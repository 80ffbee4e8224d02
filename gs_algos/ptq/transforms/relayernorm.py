"""Gives all channels behind a norm one range, so that one scale for the whole tensor serves them all.

RepQ-ViT: Li et al. 2022, arXiv:2212.08254. Differs from the paper: every channel is centred on 0, not on the mean of
the channels' middles, which an asymmetric grid minds as little and a symmetric one needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.ptq.transforms.columns import StageColumns


def relayernorm(columns: StageColumns, _: float | None) -> dict[str, Tensor]:
    """Returns the scale `d_j / mean d`, `[K]`, `d = max x_j - min x_j`; 1 where a channel is constant.

    Where no shift can be taken back, `d` is `max|x_j|`.
    """
    width = columns.high - columns.low if columns.shifts else columns.absmax
    alive = width > 0
    if not bool(alive.any()):
        return {"by ranges": torch.ones_like(width)}
    return {"by ranges": torch.where(alive, width / width[alive].mean(), 1.0)}


def middle(columns: StageColumns, scale: Tensor) -> Tensor:
    """Computes the shift `(max x_j + min x_j) / 2 / scale_j`, `[K]`, that centres each scaled channel on 0."""
    return (columns.high + columns.low) / 2 / scale
