"""Rounds float weights to nearest packed codes, from their values alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.quant.packed.module import PackedFormat, zero_as
from gs_algos.quant.ranges import search_range
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import PackedWeight, PerChannel, PerGroup, PerTensor, choose_qparams, fake_quant, pack_weight, quantize
from gs_kernels.pack.layouts import BITS

CHUNK = 2**24  # weights that are rounded at a time: bounds what a large layer needs beside itself
FEW_BITS = 4  # up to which one level more is worth a sign: at 8 bits nothing is gained
SMALLEST_LOSS = 2.0**-8  # largest relative change of a scale that storing it in 16 bits may bring


def packable(weight: str | Scheme) -> Scheme:
    """Parses a scheme, and refuses one that weights cannot be packed with.

    Raises:
        ValueError: if its bits are not 1, 2, 4 or 8, or it is learned.
    """
    scheme = Scheme.parse(weight, "weight")
    if scheme.bits not in BITS:
        wider = min(bits for bits in BITS if bits > scheme.bits)
        raise ValueError(
            f"quantize_weights: bits must be one of {', '.join(map(str, BITS))}, got {scheme}; {scheme.bits}-bit codes "
            f"would take the bytes of {wider}-bit ones: use int{wider}"
        )
    if scheme.learned:
        raise ValueError(f"quantize_weights: lsq needs training, got {scheme}; use minmax or mse, or SimQAT")
    return scheme


def group_size(scheme: Scheme, k: int) -> int:
    """Elements of a row of K that share a scale."""
    return scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else k


@torch.no_grad()
def round_to_nearest(weight: Tensor, scheme: str | Scheme) -> PackedWeight:
    """Rounds to the nearest packed weight `weight [N, K]` fp32 / fp16 / bf16, on its device, canonical.

    Scales are stored in 16 bits (the weight's own type if it has 16, else fp16), or in fp32 if that would change one by
    more than 2**-8; codes are rounded against the scales as stored, so storing them adds no error of its own.

    Symmetric, 2 to 4 bits: a signed grid has one level more below 0 than above, so each group's scale has the sign
    that brings its largest weight to that level (as llama.cpp's Q4_0; scales may be negative), unless the grid of a
    range around 0, half a step wider, has the smaller squared error.

    1 bit: no range gives a good grid of two values, so the values are those of least squares, whatever the observer:
    ±mean(|w|) of each group, or, with `asym`, the means of the weights below and not below the group's mean.

    Raises:
        ValueError: as `packable`; if the group does not divide K, or a weight is NaN or Inf.
    """
    scheme = packable(scheme)
    n, k = weight.shape
    n_scales(scheme.granularity, (n, k))
    size = group_size(scheme, k)
    chunks = list(_chunks(weight.detach(), scheme, size))
    grids = [_grid(rows.float(), scheme) for rows in chunks]
    dtype = _stored_dtype(weight.dtype, grids)
    parts = []
    for rows, (scale, zero) in zip(chunks, grids, strict=True):
        scale = scale.to(dtype)
        codes = _codes(rows.float(), scale.float(), zero, scheme).view(-1, k)
        part = pack_weight(codes, scale, zero.to(dtype), bits=scheme.bits, group_size=size)
        parts.append(zero_as(part, constant=scheme.symmetric))
    zeros = [part.zero for part in parts if isinstance(part.zero, Tensor)]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else parts[0].zero,
        shape=(n, k),
    )


@torch.no_grad()
def packed_format(weight: Tensor, scheme: str | Scheme) -> PackedFormat:
    """Returns the format that `round_to_nearest` gives for `weight [N, K]`; scales of a meta tensor count as 16 bits.

    Raises:
        ValueError: as `round_to_nearest`.
    """
    scheme = packable(scheme)
    n, k = weight.shape
    n_scales(scheme.granularity, (n, k))
    size = group_size(scheme, k)
    like = PackedFormat.of(round_to_nearest(torch.ones(1, 1, device="cpu"), replace(scheme, granularity=PerChannel(0))))
    grids = [] if weight.is_meta else [_grid(rows.float(), scheme) for rows in _chunks(weight.detach(), scheme, size)]
    dtype = str(_stored_dtype(weight.dtype, grids)).removeprefix("torch.")
    return replace(like, shape=(n, k), group_size=size, scale_dtype=dtype)


def _chunks(weight: Tensor, scheme: Scheme, size: int) -> Iterator[Tensor]:
    """Splits the weight into whole rows, each `[groups, size]`; one piece if one scale is for all."""
    n, k = weight.shape
    if isinstance(scheme.granularity, PerTensor):
        yield weight.reshape(1, n * k)
        return
    for part in weight.split(max(1, CHUNK // k)):
        yield part.reshape(-1, size)


def _grid(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale, zero) `[groups]` fp32 of `rows [groups, size]` fp32."""
    if not bool(rows.isfinite().all()):
        raise ValueError("quantize_weights: weights must be finite, got NaN or Inf")
    if scheme.bits > 1:
        return _symmetric_grid(rows, scheme) if _one_more_below(scheme) else _range_grid(rows, scheme)
    if scheme.symmetric:
        scale = 2 * rows.abs().mean(1)
        return scale, torch.full_like(scale, 0.5)
    mean = rows.mean(1, keepdim=True)
    upper = rows >= mean
    count = upper.sum(1).clamp(min=1)
    high = torch.where(upper, rows, 0).sum(1) / count
    below = rows.shape[1] - count
    low = torch.where(below > 0, torch.where(upper, 0, rows).sum(1) / below.clamp(min=1), high)
    scale = torch.where(high > low, high - low, 1.0)
    return scale, -low / scale


def _range_grid(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    low, high = search_range(rows, scheme)
    return choose_qparams(low, high, qmin=scheme.qmin, qmax=scheme.qmax, symmetric=scheme.symmetric)


def _one_more_below(scheme: Scheme) -> bool:
    return scheme.symmetric and scheme.qmin < -scheme.qmax and scheme.bits <= FEW_BITS


def signs_of(scheme: Scheme) -> str:
    """Tells which signs scales of `round_to_nearest` can have, for `Packed.signs`."""
    if scheme.bits == 1 and scheme.symmetric:
        return "not negative"  # rows of zeros have a scale of 0
    return "not zero" if _one_more_below(scheme) else "positive"


def _symmetric_grid(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    extreme = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = torch.where(extreme > 0, -1.0, 1.0)
    rows = rows * sign.unsqueeze(1)  # the largest weight of each is below 0 now
    wide, zero = _range_grid(rows, scheme)
    full = wide * ((scheme.qmax - scheme.qmin) / (-2.0 * scheme.qmin))  # what was half a step further out is qmin
    errors = [(_on_grid(rows, scale, zero, scheme) - rows).square().sum(1) for scale in (full, wide)]
    return torch.where(errors[0] <= errors[1], full, wide) * sign, zero


def _on_grid(rows: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    return fake_quant(rows, scale, zero, qmin=scheme.qmin, qmax=scheme.qmax, granularity=PerChannel(0))


def _codes(rows: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """`[groups, size]` int8, or uint8 for an unsigned grid and for 1 bit."""
    if scheme.bits > 1:
        rows, scale = rows * scale.sign().unsqueeze(1), scale.abs()
        return quantize(rows, scale, zero, qmin=scheme.qmin, qmax=scheme.qmax, granularity=PerChannel(0))
    middle = (0.5 - zero) * scale
    return (rows >= middle[:, None]).to(torch.uint8)


def _stored_dtype(weight: torch.dtype, grids: list[tuple[Tensor, Tensor]]) -> torch.dtype:
    dtype = weight if weight.itemsize == 2 else torch.float16
    exact = (((t.to(dtype).float() - t).abs() <= SMALLEST_LOSS * t.abs()).all() for grid in grids for t in grid)
    return dtype if all(bool(fits) for fits in exact) else torch.float32
