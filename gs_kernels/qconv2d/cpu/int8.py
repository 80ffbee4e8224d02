"""Convolves 8-bit images with a packed weight on the CPU: sums of integers first, then one pass for the result.

The way to the sums was chosen by measuring; the first that fits is taken:

1. Depthwise, without a residual: C++ of our own (direct_int8.py), from codes to codes in one call.
2. No groups of channels, and few products or a CPU without int8 instructions (VNNI): direct_int8.py too.
3. A CPU with int8 instructions, and groups of channels or many pixels for each channel: oneDNN's convolution of uint8
   codes, which packs the weight for each size of image.
4. A CPU with int8 instructions otherwise: im2col, some images at a time, then ATen's product of int8 matrices.
5. A CPU without them: a float convolution of the codes, which is exact while no sum can exceed 2**24; a layer that is
   too deep for that is convolved in chunks of its channels.

The last pass scales, adds, activates and rounds the sums: in C++, or in a function fused by inductor where C++ does
not run or does not have the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import codes_of
from gs_kernels.qconv2d.cpu.direct_int8 import (
    ConvolvesImages,
    Dense,
    Depthwise,
    Int8Epilogue,
    center_codes,
    kernels,
    supports_depthwise,
    supports_epilogue,
)
from gs_kernels.qconv2d.dense import empty_image
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.ref import convolve_int8_ref, int8_epilogue, requant_params
from gs_kernels.qmatmul.cpu.float import without_autocast
from gs_kernels.qmatmul.cpu.int8 import product_of_codes, whole_zero
from gs_kernels.runtime.inductor import call, compiled
from gs_kernels.runtime.instructions import multiplies_int8
from gs_kernels.runtime.torch_private import int_mm

COPIED = 1 << 23  # bytes of what pixels see and of sums, at a time
COMPILE_FROM = 1 << 16  # elements of y
WHOLE = 2.0**24  # fp32 holds all whole numbers up to here
EAGER_CALLS = 32  # of one layer, after which less is worth the wait for a compiler too
DENSE_UP_TO = 1 << 21  # products, up to which C++ of our own is faster than instructions for int8: measured, 1 thread
PIXELS = 64  # for each channel of y, from which on oneDNN is faster: measured, 2 threads


@dataclass(frozen=True)
class Int8Weight:
    """Holds a weight as int8 `[O, K]`, and the part of its zero points that int8 codes cannot hold.

    Products are of `2 * (code - zero)`, so that zero points of half a step are whole numbers.

    Args:
        codes: `2 * code - 2 * zero`, with `2 * zero` rounded; for 8-bit weights `code - 128`.
        twice: factor of the sums of `codes`: 1, and 2 for 8-bit weights, whose codes are not doubled.
        zero2: fp32 `[O, G]`, added to the doubled codes of 8-bit weights: `256 - 2 * zero`; None if it is 0 everywhere.
        fraction: fp32 `[O, G]`, the zero point less its nearest half step; None if it is 0 everywhere.
        sums: int32 `[O, G]`, the sum of `2 * code - 2 * zero` of each group.
    """

    codes: Tensor
    twice: int
    zero2: Tensor | None
    fraction: Tensor | None
    sums: Tensor


def make_int8_weight(weight: PackedWeight) -> Int8Weight:
    """Makes the int8 form of a weight.

    Raises:
        UnsuitableError: if zero points lie so far off the grid that int8 does not hold `2 * code - 2 * zero`.
    """
    codes = codes_of(weight)
    size, whole = weight.group_size, weight.bits == 8
    zero = weight.zero.float() if isinstance(weight.zero, Tensor) else torch.full(weight.scale.shape, weight.zero)
    near2 = torch.round(2 * zero)
    fraction = zero - near2 / 2
    sums = 2 * codes.unflatten(1, (-1, size)).sum(2, dtype=torch.int32) - (near2 * size).int()
    if whole:
        centered, moved = (codes ^ 128).view(torch.int8), 256 - near2
    elif bool((near2 < 2 ** (weight.bits + 1) - 128).any() | (near2 > 128).any()):
        raise UnsuitableError("zero points lie far off the grid")
    else:
        centered, moved = codes.view(torch.int8) * 2 - near2.to(torch.int8).repeat_interleave(size, 1), near2[:0]
    zero2, rest = (t if bool(t.any()) else None for t in (moved, fraction))
    return Int8Weight(centered, 2 if whole else 1, zero2, rest, sums)


def qconv2d_int8_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    with without_autocast():
        try:
            run = Int8Convolution(weight, geometry, x_scale, x_zero, bias, requant[3:], activation, dtype, keep)
        except UnsuitableError:
            return convolve_int8_ref(x, x_scale, x_zero, weight, bias, requant, geometry, activation, dtype)
        return run.at(x.shape, None if residual is None else residual.dtype)(x, *requant[:3])


class Int8Convolution:
    """Prepares `qconv2d_int8` on a CPU: everything but image and residual is fixed; `at` fixes their shape too.

    Args:
        out: inverse scale of the result's codes, whole part and fraction of their zero point (`requant_params`).
        keep: whether the weight as int8 codes is kept while the packed codes live.

    Raises:
        UnsuitableError: if products of int8 matrices cannot give the sums.
    """

    def __init__(
        self,
        weight: PackedWeight,
        geometry: ConvGeometry,
        x_scale: Tensor,
        x_zero: Tensor | None,
        bias: Tensor | None,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        self.int8_weight, self.weight, self.geometry = _int8_weight_of(weight, keep), weight, geometry
        self.shift = _padding_code(x_zero)
        self.x_scale, self.bias, self.out, self.activation, self.dtype = x_scale, bias, out, activation, dtype
        self.n, self.k = weight.shape
        self.one = _has_one_sum(self.int8_weight, weight)
        self.scale, none = weight.scale.reshape(-1).contiguous(), torch.zeros(self.n)
        self.offsets = {True: none, False: (self.int8_weight.sums * -self.shift).view(-1) if self.one else none}
        self.epilogue: Int8Epilogue | None = None
        self.depthwise: Depthwise | None = None
        if self.one and supports_epilogue(activation, dtype, out[0] is not None):
            fixed = (self.int8_weight.codes, self.int8_weight.twice, self.shift, self.scale, x_scale, bias)
            self.epilogue = Int8Epilogue(kernels(), *fixed, out, activation)
            if supports_depthwise(self.n, self.k, geometry):
                self.depthwise = Depthwise(self.epilogue, self.int8_weight.codes, geometry)
        self.has_dense = self.epilogue is not None and geometry.groups == 1
        in_fp32 = self.one and not self.has_dense and not multiplies_int8()
        self.chunks = exact_chunks(self.int8_weight.codes, self.shift, geometry) if in_fp32 else None
        self.packs: dict[tuple[int, ...], Tensor] = {}  # the weight as oneDNN wants it, by the shape of x
        self.calls = 0

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images of one shape and a residual of one dtype, or none; see `ConvolvesImages`."""
        b, (p, q) = shape[0], self.geometry.output(*shape[2:])
        if self.depthwise is not None and residual is None:
            return self.depthwise.at(*shape)
        return self.dense.at(*shape) if self._prefers_dense(b * p * q, residual) else self._by_rows

    def _by_rows(
        self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """Convolves images of any shape through their sums, some images at a time."""
        self.calls += 1
        b, (p, q) = x.shape[0], self.geometry.output(*x.shape[2:])
        added, grid = None if residual is None else residual.permute(0, 2, 3, 1).reshape(-1, self.n), (scale, zero)
        direct = self.chunks is not None or prefers_onednn(self.int8_weight, self.weight, self.geometry, b * p * q)
        step = max(1, COPIED // max(1, p * q * (4 * self.n if direct else self.k * self.geometry.groups + 4 * self.n)))
        if 0 < b <= step:
            return self._rows(x, (added, *grid), direct).view(b, p, q, self.n).permute(0, 3, 1, 2)
        y = empty_image(x, self.n, self.geometry, self.dtype if self.out[0] is None else torch.int8)
        rows = y.permute(0, 2, 3, 1)
        for first in range(0, b if y.numel() else 0, step):
            part = None if added is None else added[first * p * q : (first + step) * p * q]
            place = rows[first : first + step]
            place.copy_(self._rows(x[first : first + step], (part, *grid), direct).view(place.shape))
        return y

    def _prefers_dense(self, pixels: int, residual: torch.dtype | None) -> bool:
        few = not multiplies_int8() or pixels * self.n * self.k <= DENSE_UP_TO
        return self.has_dense and few and pixels > 0 and self.epilogue is not None and self.epilogue.accepts(residual)

    @cached_property
    def dense(self) -> Dense:
        assert self.epilogue is not None
        return Dense(self.epilogue, self.int8_weight.codes, self.geometry)

    def _rows(self, x: Tensor, residual: tuple[Tensor | None, ...], direct: bool) -> Tensor:
        """Convolves images `[B, C, H, W]` to rows `[M, O]`."""
        requant: Any = (*residual, *self.out)
        if self.chunks is not None:
            sums = fp32_sums(x, self.shift, self.chunks, self.geometry)
        elif direct:
            sums = onednn_sums(x, self.shift, self.int8_weight.codes, self.geometry, self.packs)
        else:
            groups = x.permute(0, 2, 3, 1).chunk(self.geometry.groups, 3)
            patches = [_im2col(group, self.shift, self.geometry) for group in groups]
            if not self.one:
                y = self._by_groups(patches)
                return int8_epilogue(y, self.x_scale, self.bias, requant, self.activation, self.dtype)
            sums = _multiply(patches, self.int8_weight.codes)
        if self.epilogue is not None and self.epilogue.accepts(None if residual[0] is None else residual[0].dtype):
            return self.epilogue(sums, *residual)
        fixed = (self.x_scale, self.bias, self.activation, self.dtype, *requant)
        args = (sums, self.int8_weight.twice, self.offsets[direct], self.scale, *fixed)
        run: Any = fused_epilogue
        if (sums.numel() >= COMPILE_FROM or self.calls > EAGER_CALLS) and 1 not in sums.shape:
            args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
            kinds = tuple(a.dtype if isinstance(a, Tensor) else a for a in args)
            run = compiled(fused_epilogue, kinds, lambda: _example(kinds))
        return call(run, *args)  # type: ignore[no-any-return]

    def _by_groups(self, patches: list[Tensor]) -> Tensor:
        """Sums all groups of the weight, with their zero points and scales, to fp32 `[M, O]`."""
        int8_weight, size, n, scale = self.int8_weight, self.weight.group_size, self.n, self.weight.scale
        y, last = torch.zeros(patches[0].shape[0], n), scale.shape[1] - 1
        # groups that are one scale in memory are parts of one sum, which is rounded once
        before: Any = 0 if last and scale.stride(1) == 0 else None
        x_before: Any = 0
        for g in range(scale.shape[1]):
            parts = [part[:, g * size : (g + 1) * size].contiguous() for part in patches]
            sums = _multiply(parts, int8_weight.codes[:, g * size : (g + 1) * size]) * int8_weight.twice
            sums = sums - int8_weight.sums[:, g] * self.shift
            x_sums = torch.stack([part.sum(1, dtype=torch.int32) for part in parts], 1)
            x_sums = x_sums.repeat_interleave(n // self.geometry.groups, 1)  # [M, O]
            if int8_weight.zero2 is not None:
                sums = sums + int8_weight.zero2[:, g].int() * x_sums
            x_sums = x_sums - self.shift * size
            if before is not None:
                before, x_before = sums.long() + before, x_sums.long() + x_before
                if g < last:
                    continue
                sums, x_sums = before, x_before
            real = sums.float() * 0.5
            if int8_weight.fraction is not None:
                real = real - int8_weight.fraction[:, g] * x_sums.float()
            y = y + real * scale[:, g].float()
        return y


def _padding_code(x_zero: Tensor | None) -> int:
    """Returns the zero point of x, which pads it; raises unless it is a code."""
    must = "a whole number from -128 to 127"
    value = whole_zero("qconv2d_int8", x_zero, must)
    if not -128 <= value <= 127:
        raise ValueError(f"qconv2d_int8: x_zero must be {must}, got {value}")
    return value


def _int8_weight_of(weight: PackedWeight, keep: bool) -> Int8Weight:
    if multiplies_int8() and not multiplies_exactly():
        raise UnsuitableError("products of int8 matrices saturate here")
    return derived(weight, torch.int8, make_int8_weight) if keep else make_int8_weight(weight)


@cache
def multiplies_exactly() -> bool:
    """Says whether ATen's int8 product is exact at the ends of the range: without VNNI, pairs can saturate."""
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    a, b = ends.repeat(32, 64), ends.repeat_interleave(64).repeat(16, 1)
    return torch.equal(int_mm(a, b.t()), (a.long() @ b.long().t()).int())


def _has_one_sum(int8_weight: Int8Weight, weight: PackedWeight) -> bool:
    """Says whether one sum of products gives y: no groups along K, no zero points that int8 codes cannot hold."""
    return weight.scale.shape[1] == 1 and int8_weight.zero2 is None and int8_weight.fraction is None


def prefers_onednn(int8_weight: Int8Weight, weight: PackedWeight, geometry: ConvGeometry, pixels: int) -> bool:
    """Says whether oneDNN convolves so many pixels faster than im2col would, and gives all sums."""
    many = geometry.groups > 1 or pixels >= PIXELS * weight.shape[0]
    return many and multiplies_int8() and _has_one_sum(int8_weight, weight) and convolves_exactly()


@cache
def convolves_exactly() -> bool:
    """Says whether torch has oneDNN's convolution of 8-bit codes, and it is exact at the ends of the range."""
    x = torch.tensor([-128, 127], dtype=torch.int8).repeat(64).view(1, 64, 1, 2)
    w = torch.tensor([127, -128], dtype=torch.int8).repeat_interleave(64).view(2, 64)
    try:
        got = onednn_sums(x, 3, w, ConvGeometry(1, 1), {})
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(got.double(), (x.double()[0, :, 0].t() - 3) @ w.double().t())


def exact_chunks(codes: Tensor, shift: int, geometry: ConvGeometry) -> list[Tensor] | None:
    """Splits filters, fp32 `[O, C / groups, R, S]`, into the fewest chunks of channels whose sums stay below 2**24.

    Returns None if one channel is too much already, or if groups of channels would need several chunks.
    """
    filters = codes.view(codes.shape[0], geometry.r, geometry.s, -1).permute(0, 3, 1, 2).float()
    low, high = 128.0 + shift, 127.0 - shift  # centered codes of x reach so far on either side of 0
    above, below = filters.clamp(min=0).sum((2, 3)), filters.clamp(max=0).sum((2, 3)).neg()  # [O, C / groups]
    most = torch.maximum(high * above + low * below, low * above + high * below).double()
    channels = filters.shape[1]
    for count in range(1, channels + 1 if geometry.groups == 1 else 2):
        step = -(-channels // count)
        if max(float(part.sum(1).max()) for part in most.split(step, 1)) <= WHOLE:
            return [part.contiguous(memory_format=torch.channels_last) for part in filters.split(step, 1)]
    return None


def fp32_sums(x: Tensor, shift: int, chunks: list[Tensor], geometry: ConvGeometry) -> Tensor:
    """Sums `codes * (x - shift)` over the filters in fp32: images `[B, C, H, W]` to `[M, O]`, rounded once."""
    x = x.contiguous(memory_format=torch.channels_last)
    total: Tensor | None = None
    pieces = (x,) if len(chunks) == 1 else x.split(chunks[0].shape[1], 1)
    for piece, filters in zip(pieces, chunks, strict=True):
        centered = center_codes(
            piece if len(chunks) == 1 else piece.contiguous(memory_format=torch.channels_last), shift
        )
        padding = (geometry.top, geometry.left)
        if not geometry.is_symmetric:
            centered, padding = pad(centered, geometry.sides), (0, 0)
        sums = conv2d(centered, filters, None, geometry.stride, padding, geometry.dilation, geometry.groups)
        total = sums if len(chunks) == 1 else sums.int() if total is None else total.add_(sums.int())
    assert total is not None
    return total.permute(0, 2, 3, 1).reshape(-1, total.shape[1]).float()


def onednn_sums(
    x: Tensor, shift: int, codes: Tensor, geometry: ConvGeometry, packs: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """Sums `codes * (x - shift)` over the filters by oneDNN: images `[B, C, H, W]` to fp32 `[M, O]`, rounded once.

    packs: shape of the images -> the weight as oneDNN packed it for them; holds the last shape alone.
    """
    if not geometry.is_symmetric:
        x = pad(x, geometry.sides, value=shift)
    padding = [geometry.top, geometry.left] if geometry.is_symmetric else [0, 0]
    settings: tuple[Any, ...] = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)
    o, size = codes.shape[0], tuple(x.shape)
    scale = torch.ones(o)
    pack = packs.get(size)
    if pack is None:
        w = codes.view(o, geometry.r, geometry.s, -1).permute(0, 3, 1, 2)
        pack = torch.ops.onednn.qconv_prepack(w, scale, 1.0, shift + 128, *settings, list(size))
        packs.clear()
        packs[size] = pack
    shifted = (x.contiguous(memory_format=torch.channels_last).view(torch.uint8) ^ 128, 1.0, shift + 128)
    zeros = torch.zeros(o, dtype=torch.int64)
    none: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    y = torch.ops.onednn.qconv2d_pointwise(*shifted, pack, scale, zeros, None, *settings, *none)
    return y.permute(0, 2, 3, 1).reshape(-1, o)


def _im2col(x: Tensor, shift: int, geometry: ConvGeometry) -> Tensor:
    """Copies the inputs of each pixel of y into a row: `[B, H, W, C / groups]` to `[M, K]`; pointwise it is a view."""
    b, h, w, c = x.shape
    p, q = geometry.output(h, w)
    if any(geometry.sides):
        x = pad(x, (0, 0, *geometry.sides), value=shift)
    if not geometry.is_pointwise:
        sb, sh, sw, sc = x.stride()
        sizes = (b, p, q, geometry.r, geometry.s, c)
        strides = (
            sb,
            sh * geometry.stride_h,
            sw * geometry.stride_w,
            sh * geometry.dilation_h,
            sw * geometry.dilation_w,
            sc,
        )
        x = x.as_strided(sizes, strides, x.storage_offset())
    return x.reshape(b * p * q, -1).contiguous()


def _multiply(patches: list[Tensor], codes: Tensor) -> Tensor:
    """Multiplies the patches of each group with its codes: int32 `[M, O]`, exact."""
    products = [product_of_codes(a, w) for a, w in zip(patches, codes.chunk(len(patches)), strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def fused_epilogue(
    sums: Tensor,
    twice: int,
    shift: Tensor,
    scale: Tensor,
    x_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    *requant: Any,
) -> Tensor:
    """Makes `[M, O]` of the sums of one group."""
    return int8_epilogue(
        (sums * twice + shift).float() * 0.5 * scale.float(), x_scale, bias, tuple(requant), activation, dtype
    )


def _example(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    m, o = 1021, 131
    sizes = ((m, o), (), (o,), (o,), (1,), (o,), (), (), (m, o), (1,), (1,), (1,), (1,), (1,))
    return tuple(
        torch.ones(size, dtype=kind) if size and kind is not None else kind
        for kind, size in zip(kinds, sizes, strict=True)
    )
