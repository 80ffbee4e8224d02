"""Holds what transforms see of a stage: extremes and means of its input, and the weights that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StageColumns:
    """Describes the tensor `x [T, K]` that the layers of a stage read, column by column.

    Args:
        absmax: `[K]` fp32, largest |x|.
        absmean: `[K]` fp32, mean |x|.
        low, high: `[K]` fp32, smallest and largest x.
        shifts: whether the layer before and those that read x have biases, which can take a shift of x back.
        weights: `[N, K]` fp32 each.
        group_sizes: of the grid of each weight: inputs that share a scale.
    """

    absmax: Tensor
    absmean: Tensor
    low: Tensor
    high: Tensor
    shifts: bool
    weights: tuple[Tensor, ...]
    group_sizes: tuple[int, ...]

    @property
    def weight_absmax(self) -> Tensor:
        """Returns the largest |w| of each column over all weights, `[K]`."""
        return torch.stack([weight.abs().amax(0) for weight in self.weights]).amax(0)

    @property
    def weight_share(self) -> Tensor:
        """Returns the mean over all rows of |w| over the largest of its group, `[K]`; 0 in a group of zeros."""
        parts = []
        for weight, size in zip(self.weights, self.group_sizes, strict=True):
            groups = weight.abs().view(len(weight), -1, size)
            largest = groups.amax(2, keepdim=True)
            parts.append((groups / torch.where(largest > 0, largest, 1.0)).view(weight.shape))
        return torch.cat(parts).mean(0)
