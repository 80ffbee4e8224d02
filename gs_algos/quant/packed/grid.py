"""Finds the grid that a weight is rounded to, with scales as they are stored, and turns codes into values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gs_algos.quant.packed import float_grid
from gs_algos.quant.packed.module import zero_as
from gs_algos.quant.ranges import search_range, squared_error
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import FloatFormat, PackedWeight, PerChannel, PerGroup, PerTensor, choose_qparams, pack_weight, quantize
from gs_kernels.pack.layouts import BITS

CHUNK = 2**24  # weights that are worked on at a time: bounds what a large layer needs beside itself
FEW_BITS = 4  # up to which one level more is worth a sign: at 8 bits nothing is gained
SMALLEST_LOSS = 2.0**-8  # largest relative change of a scale that storing it in 16 bits may bring


@dataclass(frozen=True)
class Grid:
    """Holds the grid of a weight `[N, K]`: `real = (code - zero) * scale`, a scale for each group of each row.

    Of 4-bit floats it is `real = e2m1 of the code * scale`, and zeros are 0.

    Args:
        scale: `[N, G]` fp32, rounded to `dtype` already; G = K / group size. May be negative.
        zero: `[N, G]` fp32; whole numbers except for 1 bit, whose zero points `packed` rounds to `dtype`.
        scheme: its integers are the codes, which are stored in the next of 1, 2, 4 or 8 bits.
        dtype: that scales and zero points are stored in.
        divisor: `[1]` fp32 that scales of nvfp4 are divided by, `scale` already; else None.
    """

    scale: Tensor
    zero: Tensor
    scheme: Scheme
    dtype: torch.dtype
    divisor: Tensor | None = None

    @property
    def stored_zero(self) -> Tensor:
        """Returns the zero points `[N, G]` fp32 as they are stored."""
        if isinstance(self.scheme.format, FloatFormat):
            return self.zero
        return self.zero.to(self.dtype).float()

    def storable(self, scale: Tensor) -> Tensor:
        """Rounds scales, fp32, to the nearest that can be stored, fp32."""
        if isinstance(self.scheme.format, FloatFormat):
            return float_grid.storable(scale, self.scheme.format, self.divisor)
        return scale.to(self.dtype).float()

    @property
    def limits(self) -> tuple[int, int]:
        """Returns the smallest and the largest code."""
        return (0, 1) if self.scheme.bits == 1 else (self.scheme.qmin, self.scheme.qmax)

    def rows(self, rows: slice) -> Grid:
        """Returns the grid of some rows of the weight."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def codes(self, weight: Tensor) -> Tensor:
        """Rounds `weight [N, K]` to the nearest codes: int8, or uint8 for unsigned grids, floats and 1 bit."""
        groups, scale, zero = weight.float().reshape(self.scale.numel(), -1), self.scale.flatten(), self.zero.flatten()
        if self.scheme.is_float:
            return float_grid.nearest_codes(groups / scale.unsqueeze(1)).view(weight.shape)
        if self.scheme.bits == 1:
            middle = (0.5 - zero) * scale
            return (groups >= middle.unsqueeze(1)).to(torch.uint8).view(weight.shape)
        groups, scale = groups * scale.sign().unsqueeze(1), scale.abs()
        limits = {"qmin": self.scheme.qmin, "qmax": self.scheme.qmax}
        return quantize(groups, scale, zero, **limits, granularity=PerChannel(0)).view(weight.shape)

    def values(self, codes: Tensor) -> Tensor:
        """Computes the real values `[N, K]` fp32 of codes."""
        if self.scheme.is_float:
            values = float_grid.levels(codes.device)[codes.int()].view(*self.scale.shape, -1)
            return (values * self.scale.unsqueeze(-1)).view(codes.shape)
        groups = codes.float().view(*self.scale.shape, -1)
        return ((groups - self.stored_zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).view(codes.shape)

    def packed(self, codes: Tensor) -> PackedWeight:
        """Packs codes `[N, K]`, canonical."""
        if isinstance(self.scheme.format, FloatFormat):
            scale = float_grid.stored(self.scale, self.scheme.format, self.divisor)
            size, table = self.scheme.format.group_size, float_grid.levels(codes.device)
            return pack_weight(codes, scale, bits=4, group_size=size, levels=table, divisor=self.divisor)
        scale, zero = self.scale.to(self.dtype), self.zero.to(self.dtype)
        size = codes.shape[1] // scale.shape[1]
        weight = pack_weight(codes, scale, zero, bits=stored_bits(self.scheme), group_size=size)
        return zero_as(weight, constant=self.scheme.symmetric)


def stored_bits(scheme: Scheme) -> int:
    """Returns the bits that a packed code of the scheme takes: 4 for one of 3."""
    return min(bits for bits in BITS if bits >= scheme.bits)


def group_size(scheme: Scheme, k: int) -> int:
    """Elements of a row of K that share a scale."""
    return scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else k


def chunk_rows(k: int) -> int:
    """Returns how many rows of K weights are worked on at a time."""
    return max(1, CHUNK // k)


@torch.no_grad()
def grid_of(
    weight: Tensor,
    scheme: Scheme,
    dtype: torch.dtype | None = None,
    importance: Tensor | None = None,
    positive: bool = False,
) -> Grid:
    """Finds the grid of `weight [N, K]` by the scheme's observer, on its device.

    Scales are stored in 16 bits (in `dtype` if it has 16, else fp16), or in fp32 if that would change one by more than
    2**-8. Those of 4-bit floats are stored in 8, see `float_grid`.

    Symmetric, 2 to 4 bits: a signed grid has one level more below 0 than above, so each group's scale has the sign
    that brings its largest weight to that level (as llama.cpp's Q4_0; scales may be negative), unless the grid of a
    range around 0, half a step wider, has the smaller squared error.

    1 bit: no range gives a good grid of two values, so the values are those of least squares, whatever the observer:
    ±mean(|w|) of each group, or, with `asym`, the means of the weights below and not below the group's mean.

    Args:
        weight: fp32 / fp16 / bf16.
        scheme: integers, granularity and observer.
        dtype: of the float weight that the packed one replaces; None for that of `weight`.
        importance: `[N, K]` or `[K]` fp32, > 0: how many times the squared error of a weight counts; None for once.
        positive: for a layer that multiplies integers, of 2 to 8 bits: scales > 0, stored in fp32.

    Raises:
        ValueError: if the group does not divide K, or a weight is NaN or Inf.
    """
    n, k = weight.shape
    n_scales(scheme.granularity, (n, k))
    counts = None if importance is None else _in_groups(importance.float().expand(n, k), scheme)
    if isinstance(scheme.format, FloatFormat):
        if positive:
            raise ValueError(f"quantize_weights: layers that multiply integers take grids of integers, got {scheme}")
        return _float_grid(weight, scheme, scheme.format, counts)
    found = [
        _search(groups.float(), scheme, None if counts is None else next(counts), positive)
        for groups in _in_groups(weight.detach(), scheme)
    ]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    dtype = torch.float32 if positive else stored_dtype(weight.dtype if dtype is None else dtype, scale, zero)
    shape = (-1, k // group_size(scheme, k))
    scale, zero = (t.view(shape).expand(n, -1).contiguous() for t in (scale.to(dtype).float(), zero))
    return Grid(scale, zero, scheme, dtype)


def _float_grid(weight: Tensor, scheme: Scheme, format: FloatFormat, counts: Iterator[Tensor] | None) -> Grid:
    _refuse_nonfinite(weight)
    divisor = float_grid.divisor_of(weight) if format.divided else None
    scale = torch.cat(
        [
            float_grid.find_scales(
                groups.float(), format, scheme.observer, divisor, None if counts is None else next(counts)
            )
            for groups in _in_groups(weight.detach(), scheme)
        ]
    ).view(len(weight), -1)
    return Grid(scale, torch.zeros_like(scale), scheme, float_grid.SCALE_DTYPES[format.name], divisor)


def _in_groups(weight: Tensor, scheme: Scheme) -> Iterator[Tensor]:
    """Splits the weight into whole rows, each `[groups, size]`; one piece if one scale is for all."""
    n, k = weight.shape
    if isinstance(scheme.granularity, PerTensor):
        yield weight.reshape(1, n * k)
        return
    for part in weight.split(chunk_rows(k)):
        yield part.reshape(-1, group_size(scheme, k))


def _search(groups: Tensor, scheme: Scheme, importance: Tensor | None, positive: bool) -> tuple[Tensor, Tensor]:
    """Finds (scale, zero) `[C]` fp32 of `groups [C, size]` fp32."""
    _refuse_nonfinite(groups)
    if scheme.bits > 1:
        search = _symmetric_grid if one_more_below(scheme) and not positive else _range_grid
        return search(groups, scheme, importance)
    if scheme.symmetric:
        scale = 2 * _mean(groups.abs(), importance)
        return scale, torch.full_like(scale, 0.5)
    upper = groups >= _mean(groups, importance).unsqueeze(1)
    count = torch.ones_like(groups) if importance is None else importance
    above, below = (torch.where(side, count, 0).sum(1) for side in (upper, ~upper))
    high, low = (torch.where(side, groups * count, 0).sum(1) for side in (upper, ~upper))
    high = high / torch.where(above > 0, above, 1)
    low = torch.where(below > 0, low / torch.where(below > 0, below, 1), high)
    scale = torch.where(high > low, high - low, 1.0)
    return scale, -low / scale


def _refuse_nonfinite(weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize_weights: weights must be finite, got NaN or Inf")


def _mean(groups: Tensor, importance: Tensor | None) -> Tensor:
    return groups.mean(1) if importance is None else (groups * importance).sum(1) / importance.sum(1)


def _range_grid(groups: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    low, high = search_range(groups, scheme, importance)
    return choose_qparams(low, high, qmin=scheme.qmin, qmax=scheme.qmax, symmetric=scheme.symmetric)


def one_more_below(scheme: Scheme) -> bool:
    """Says whether scales take the sign of their group: of few bits, and one level more below 0 than above."""
    return not scheme.is_float and scheme.symmetric and scheme.qmin < -scheme.qmax and 1 < scheme.bits <= FEW_BITS


def _symmetric_grid(groups: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = 1.0 - 2.0 * (extreme > 0).float()
    groups = groups * sign.unsqueeze(1)  # the largest weight of each is below 0 now
    wide, zero = _range_grid(groups, scheme, importance)
    full = wide * ((scheme.qmax - scheme.qmin) / (-2.0 * scheme.qmin))  # what was half a step further out is qmin
    errors = [squared_error(groups, scale, zero, scheme, importance) for scale in (full, wide)]
    return torch.where(errors[0] <= errors[1], full, wide) * sign, zero


def stored_dtype(weight: torch.dtype, *found: Tensor) -> torch.dtype:
    """Returns the dtype that scales and zero points of a weight of that dtype are stored in."""
    dtype = weight if weight.itemsize == 2 else torch.float16
    exact = (((t.to(dtype).float() - t).abs() <= SMALLEST_LOSS * t.abs()).all() for t in found)
    return dtype if all(bool(fits) for fits in exact) else torch.float32
