"""Rounds float weights to nearest packed codes, from their values alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.quant.packed.float_grid import SCALE_DTYPES
from gs_algos.quant.packed.grid import chunk_rows, grid_of, group_size, one_more_below
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import FloatFormat, PackedWeight, PerChannel
from gs_kernels.pack.layouts import BITS


def packable(weight: str | Scheme, widths: Sequence[int] = BITS, who: str = "quantize_weights") -> Scheme:
    """Parses a scheme, and refuses one that weights cannot be packed with.

    widths: bits that it may have.

    Raises:
        ValueError: if its bits are none of these, or it is learned.
    """
    scheme = Scheme.parse(weight, "weight")
    if scheme.bits not in widths:
        wider = min(bits for bits in BITS if bits > scheme.bits)
        raise ValueError(
            f"{who}: bits must be one of {', '.join(map(str, widths))}, got {scheme}; {scheme.bits}-bit codes "
            f"would take the bytes of {wider}-bit ones: use int{wider}"
        )
    if scheme.learned:
        raise ValueError(f"{who}: lsq needs training, got {scheme}; use minmax or mse, or SimQAT")
    return scheme


@torch.no_grad()
def round_to_nearest(weight: Tensor, scheme: str | Scheme) -> PackedWeight:
    """Rounds to the nearest packed weight `weight [N, K]` fp32 / fp16 / bf16, on its device, canonical.

    The grid is that of `grid_of`; codes are rounded against the scales as stored, so storing them in 16 bits adds no
    error of its own.

    Raises:
        ValueError: as `packable`; if the group does not divide K, or a weight is NaN or Inf.
    """
    grid = grid_of(weight, packable(scheme))
    n, k = weight.shape
    size = chunk_rows(k)
    pieces = zip(weight.detach().split(size), range(0, n, size), strict=True)
    parts = [(part := grid.rows(slice(first, first + size))).packed(part.codes(rows)) for rows, first in pieces]
    zeros = [part.zero for part in parts if isinstance(part.zero, Tensor)]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else parts[0].zero,
        shape=(n, k),
    )


@torch.no_grad()
def packed_format(weight: Tensor, scheme: Scheme) -> PackedFormat:
    """Returns the format of `weight [N, K]` on the grid of a scheme; scales of a meta tensor count as 16 bits.

    Raises:
        ValueError: if the group does not divide K, or a weight is NaN or Inf.
    """
    n, k = weight.shape
    n_scales(scheme.granularity, (n, k))
    if isinstance(scheme.format, FloatFormat):
        name = str(SCALE_DTYPES[scheme.format.name]).removeprefix("torch.")
        return PackedFormat(4, (n, k), scheme.format.group_size, 0.0, name, True, int(scheme.format.divided))
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    grid = grid_of(one, replace(scheme, granularity=PerChannel(0)))
    like = PackedFormat.of(grid.packed(grid.codes(one)))
    halves = weight.dtype if weight.dtype.itemsize == 2 else torch.float16
    dtype = halves if weight.is_meta else grid_of(weight, scheme).dtype
    name = str(dtype).removeprefix("torch.")
    return replace(like, shape=(n, k), group_size=group_size(scheme, k), scale_dtype=name)


def signs_of(scheme: Scheme) -> str:
    """Tells which signs scales of `round_to_nearest` can have, for `Packed.signs`."""
    if scheme.bits == 1 and scheme.symmetric:
        return "not negative"  # rows of zeros have a scale of 0
    return "not zero" if one_more_below(scheme) else "positive"
