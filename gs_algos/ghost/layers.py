"""Computes a convolution as few channels of its own, and depthwise ones on those, its ghosts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class GhostConv2d(nn.Module):
    """Computes `m = ceil(O / ratio)` channels as a convolution, the rest from them. `[B, C, H, W] -> [B, O, P, Q]`.

    `p = norm(primary(x))`, `y = concat(p, cheap_norm(cheap(p)))`, whose channels then come into the order of the
    convolution that it replaces. `cheap` is depthwise, `kernel x kernel`, and makes `ratio - 1` channels of each of p.
    Han et al. 2020, arXiv:1911.11907.

    Differs from the paper: no activation in between, so that the layer is linear as the one that it replaces; the batch
    norm behind that one is the two in here, and the activation behind it stays where it is.

    Args:
        conv: the convolution that it replaces; only its sizes and flags are read.
        norm: the batch norm behind it, or None.
        ratio: channels that are made of one.
        kernel: of the depthwise convolution, odd.
        ordered: whether channels have an order of their own; else the primary ones come first.
    """

    order: Tensor | None  # int64 [O]: the channel of the concat that each output is

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, ratio: int, kernel: int, ordered: bool) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.out_channels = conv.out_channels
        made = primary_channels(conv.out_channels, ratio)
        bias = conv.bias is not None
        self.primary = nn.Conv2d(
            conv.in_channels,
            made,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=bias,
            padding_mode=conv.padding_mode,
            **like,
        )
        extra = made * (ratio - 1)
        self.cheap = nn.Conv2d(
            made, extra, kernel, padding=kernel // 2, groups=made, bias=bias and norm is None, **like
        )
        self.primary_norm = None if norm is None else norm_like(norm, made)
        self.cheap_norm = None if norm is None else norm_like(norm, extra)
        order = torch.arange(self.out_channels, device=conv.weight.device) if ordered else None
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        p = self.primary(x)
        p = p if self.primary_norm is None else self.primary_norm(p)
        ghosts = self.cheap(p)
        ghosts = ghosts if self.cheap_norm is None else self.cheap_norm(ghosts)
        y = torch.cat([p, ghosts], 1)
        if self.order is not None:
            return y.index_select(1, self.order)
        return y if y.shape[1] == self.out_channels else y[:, : self.out_channels]

    def extra_repr(self) -> str:
        return f"{self.primary.in_channels}, {self.out_channels}, ordered={self.order is not None}"


def primary_channels(channels: int, ratio: int) -> int:
    """Returns how many of the channels are computed by the convolution itself."""
    return math.ceil(channels / ratio)


def can_split(norm: nn.Module) -> bool:
    """Says whether a batch norm can become two: it is one of PyTorch's, whose scales are learned."""
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bool(norm.affine)


def norm_like(norm: Any, channels: int) -> nn.Module:
    """Makes a batch norm with the options of another."""
    like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    made: nn.Module = type(norm)(channels, norm.eps, norm.momentum, **like)
    return made
