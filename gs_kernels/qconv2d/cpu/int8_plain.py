"""Convolves 8-bit images on a CPU where no C++ runs: whole numbers in fp32, by ATen, which is exact below 2**24.

So the speed of the float convolution is the floor. A layer that is too deep for one sum is convolved in chunks of its
channels; one whose weight has groups along K, or zero points that int8 codes do not hold, a group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.qconv2d.cpu.int8_weight import Int8Weight
from gs_kernels.qconv2d.geometry import ConvGeometry

WHOLE = 2.0**24  # fp32 holds all whole numbers up to here


class PlainSums:
    """Prepares the sums of a convolution: `[B, O, P, Q]` fp32, scaled by the weight, before the scale of x."""

    def __init__(self, weight: Int8Weight, geometry: ConvGeometry, shift: int) -> None:
        self.weight, self.geometry, self.shift = weight, geometry, shift
        filters = weight.codes.view(weight.codes.shape[0], geometry.taps, -1)
        self.parts = [_chunks_of(part, shift, geometry) for part in _by_group(filters, weight.group_size)]
        ones = torch.ones_like(filters)
        wanted = weight.zero2 is not None or weight.fraction is not None
        self.ones = (
            [_chunks_of(part, shift, geometry) for part in _by_group(ones, weight.group_size)] if wanted else None
        )

    def __call__(self, x: Tensor) -> Tensor:
        weight, y = self.weight, None
        centered = x.contiguous(memory_format=torch.channels_last).float().sub_(self.shift)
        for g, chunks in enumerate(self.parts):
            sums: Tensor = self._sum(centered, chunks) * weight.twice
            x_sums = None if self.ones is None else self._sum(centered, self.ones[g])
            if weight.zero2 is not None and x_sums is not None:
                sums = sums + weight.zero2[:, g].to(sums.dtype).view(-1, 1, 1) * x_sums
            real = sums.float() * 0.5
            if weight.fraction is not None and x_sums is not None:
                real = real - weight.fraction[:, g].view(-1, 1, 1) * x_sums.float()
            real = real * weight.scale[:, g].view(-1, 1, 1)
            y = real if y is None else y + real
        assert y is not None
        return y

    def _sum(self, x: Tensor, chunks: list[tuple[int, Tensor]]) -> Tensor:
        """Sums over filters, exactly: in fp64 once, for sums of chunks may pass 2**24."""
        geometry, padding = self.geometry, (self.geometry.top, self.geometry.left)
        if not geometry.is_symmetric:
            x, padding = pad(x, geometry.sides), (0, 0)
        about: Any = (None, geometry.stride, padding, geometry.dilation, geometry.groups)
        sums = []
        for first, filters in chunks:
            piece = x if geometry.groups > 1 else x[:, first : first + filters.shape[1]]
            sums.append(conv2d(piece.contiguous(memory_format=torch.channels_last), filters, *about).double())
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _by_group(filters: Tensor, group_size: int) -> Iterator[Tensor]:
    """Yields filters `[O, taps, C]` of each group along K, 0 elsewhere."""
    flat = filters.flatten(1)
    for first in range(0, flat.shape[1], group_size):
        part = torch.zeros_like(flat)
        part[:, first : first + group_size] = flat[:, first : first + group_size]
        yield part.view(filters.shape)


def _chunks_of(filters: Tensor, shift: int, geometry: ConvGeometry) -> list[tuple[int, Tensor]]:
    """Splits filters `[O, taps, C]` into few, `(first channel, fp32 [O, some of C, R, S])`, whose sums fit for any x.

    Channels are split where all see all channels, else taps: other filters are 0 there.
    """
    images = filters.view(filters.shape[0], geometry.r, geometry.s, -1).permute(0, 3, 1, 2).float()
    of_channel = images.abs().double().sum((2, 3)) * (128 + abs(shift))  # [O, C]
    for step in range(images.shape[1], 0, -1) if geometry.groups == 1 else ():
        if max(float(part.sum(1).max()) for part in of_channel.split(step, 1)) <= WHOLE:
            parts = images.split(step, 1)
            return [(i * step, part.contiguous(memory_format=torch.channels_last)) for i, part in enumerate(parts)]
    for rows in range(geometry.r, 0, -1):
        taps = torch.arange(geometry.r, device=images.device)[:, None]
        masks = [taps // rows == i for i in range(-(-geometry.r // rows))]
        chunks = [(images * mask).contiguous(memory_format=torch.channels_last) for mask in masks]
        if max(float(part.abs().double().sum((1, 2, 3)).max()) for part in chunks) * (128 + abs(shift)) <= WHOLE:
            return [(0, part) for part in chunks]
    raise UnsuitableError("fp32 does not hold the sums of a row of taps")
