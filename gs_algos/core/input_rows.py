"""Lays out what a layer multiplies its weight with as rows: tokens of a linear, patches of a convolution."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def groups_of(layer: nn.Module) -> int:
    """Returns how many parts of the weight see inputs of their own: those of a grouped convolution, else 1."""
    return layer.groups if isinstance(layer, CONVS) else 1


def input_rows(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the rows `[T, K]` that the layer's weight `[N, K]` is multiplied with, `[groups, T, K]` if it has groups.

    Args:
        x: the layer's input.
        mask: bool, of the leading axes of x: rows that count. One of another shape counts for nothing.
    """
    if isinstance(layer, CONVS):
        return _patches(layer, x)
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _patches(layer: Any, x: Tensor) -> Tensor:
    """Returns `[T, K]` or `[groups, T, K]`, K = C / groups * taps, in the element order of the weight."""
    spatial = len(layer.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = _windows(x, 2 + axis, size, stride, dilation)  # each adds its taps as a last axis
    batch, channels = x.shape[:2]
    shape = batch, layer.groups, channels // layer.groups, math.prod(x.shape[2 : 2 + spatial])
    x = x.reshape(*shape, *layer.kernel_size)  # [B, G, C/G, L, taps...]
    x = x.movedim(3, 2).flatten(3)  # [B, G, L, K]
    rows = x.movedim(1, 0).flatten(1, 2)  # [G, B * L, K]
    return rows[0] if layer.groups == 1 else rows


def _windows(x: Tensor, axis: int, size: int, stride: int, dilation: int) -> Tensor:
    """Returns x with the axis cut into windows: their number in its place, their taps as a last axis."""
    return x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]


def token_mask(inputs: Any) -> Tensor | None:
    """Returns the bool mask of tokens that count, of inputs with an `attention_mask [batch, tokens]`; else None."""
    mask = inputs.get("attention_mask") if hasattr(inputs, "get") else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask.bool()
