"""Convolutions of 8-bit images with a packed weight on the CPU, summed as integers.

Ways, by what was measured. Depthwise, without a residual: C++ of our own (direct_int8.py), if it runs here. So also, of
all channels, small convolutions, and on a CPU without instructions for products of int8 all: from codes to codes in one
call, with products of 16 bits. Else:
Where the CPU has instructions for products of int8: if y has many pixels for each channel, and for groups of channels,
oneDNN's convolution of uint8 codes, which packs the weight for each size of image; else, what the pixels of some images
see is copied side by side, and multiplied by ATen's product of int8 matrices.
Where it has none: a float convolution of the codes, which is exact as long as no sum can exceed 2**24. Layers that are
too deep for that take it in parts of their channels.
Behind all, one pass makes the result of the sums: C++, or where that does not run or know the activation, a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import codes_of
from gs_kernels.qconv2d.cpu.direct_int8 import Dense, Depthwise, Finish, finishes, library, suits, to_steps
from gs_kernels.qconv2d.dense import empty_image
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.ref import convolve_int8_ref, finish_int8, into_codes
from gs_kernels.qmatmul.cpu.int8 import product_of_codes, whole_zero
from gs_kernels.qmatmul.cpu.select import without_autocast
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
class Codes:
    """A weight as int8 `[O, K]`, and what that leaves of its zero points.

    Args:
        codes: `2 * code` less twice the zero point, to half steps; of 8 bits, `code - 128`.
        twice: 1 or, of 8 bits, 2: what makes the latter the former.
        zero2: fp32 `[O, G]`, what is to be added to that for the zero points of 8 bits; None if nothing is.
        rest: fp32 `[O, G]`, what of the zero points is not half steps; None if nothing is.
        sums: int32 `[O, G]`, of `2 * code - twice the zero point`.
    """

    codes: Tensor
    twice: int
    zero2: Tensor | None
    rest: Tensor | None
    sums: Tensor


def make_codes(weight: PackedWeight) -> Codes:
    """Raises UnsuitableError if zero points lie so far off the grid that int8 does not hold the rest."""
    codes = codes_of(weight)
    size, whole = weight.group_size, weight.bits == 8
    zero = weight.zero.float() if isinstance(weight.zero, Tensor) else torch.full(weight.scale.shape, weight.zero)
    near2 = torch.round(2 * zero)
    rest = zero - near2 / 2
    sums = 2 * codes.unflatten(1, (-1, size)).sum(2, dtype=torch.int32) - (near2 * size).int()
    if whole:
        steps, moved = (codes ^ 128).view(torch.int8), 256 - near2
    elif bool((near2 < 2 ** (weight.bits + 1) - 128).any() | (near2 > 128).any()):
        raise UnsuitableError("zero points lie far off the grid")
    else:
        steps, moved = codes.view(torch.int8) * 2 - near2.to(torch.int8).repeat_interleave(size, 1), near2[:0]
    return Codes(
        steps, 2 if whole else 1, moved if bool(moved.any()) else None, rest if bool(rest.any()) else None, sums
    )


def qconv2d_int8_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    window: ConvGeometry,
    x_zero: Tensor | None,
    weight_sums: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    into = into_codes(residual, residual_scale, residual_zero, out_scale, out_zero)
    with without_autocast():
        try:
            run = Int8Convolution(weight, window, x_scale, x_zero, bias, into[3:], activation, dtype, keep)
        except UnsuitableError:
            return convolve_int8_ref(x, x_scale, x_zero, weight, bias, into, window, activation, dtype)
        return run(x, into[:3])


class Int8Convolution:
    """`qconv2d_int8` on a CPU with everything fixed but the image and the residual: what can be made once, is.

    Args:
        out: of codes: inverse of their scale, whole and rest of their zero point, as `into_codes` gives them.
        keep: whether the weight as int8 codes is kept while the packed codes live.

    Raises:
        UnsuitableError: if the sums cannot be had from products of int8 matrices.
    """

    def __init__(
        self,
        weight: PackedWeight,
        window: ConvGeometry,
        x_scale: Tensor,
        x_zero: Tensor | None,
        bias: Tensor | None,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        self.known, self.weight, self.window = _codes_of(weight, keep), weight, window
        self.shift = _padding_code(x_zero)
        self.x_scale, self.bias, self.out, self.activation, self.dtype = x_scale, bias, out, activation, dtype
        self.n, self.k = weight.shape
        self.one = _has_one_sum(self.known, weight)
        self.scale, none = weight.scale.reshape(-1).contiguous(), torch.zeros(self.n)
        self.offsets = {True: none, False: (self.known.sums * -self.shift).view(-1) if self.one else none}
        self.finish: Finish | None = None
        self.depthwise: Depthwise | None = None
        if self.one and finishes(activation, dtype, out[0] is not None):
            about = (self.known.codes, self.known.twice, self.shift, self.scale, x_scale, bias)
            self.finish = Finish(library(), *about, out, activation)
            if suits(self.n, self.k, window):
                self.depthwise = Depthwise(self.finish, self.known.codes, window)
        self.has_dense = self.finish is not None and window.groups == 1
        in_fp32 = self.one and not self.has_dense and not multiplies_int8()
        self.parts = exact_parts(self.known.codes, self.shift, window) if in_fp32 else None
        self.packs: dict[tuple[int, ...], Tensor] = {}  # the weight as oneDNN wants it, by the shape of x
        self.calls = 0

    def __call__(self, x: Tensor, residual: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
        """y `[B, O, P, Q]`; residual: itself, its scale and zero point, as `qconv2d_int8` takes them."""
        self.calls += 1
        if self.depthwise is not None and residual[0] is None:
            return self.depthwise(x).permute(0, 3, 1, 2)
        b, (p, q) = x.shape[0], self.window.output(*x.shape[2:])
        if self._suits_dense(b * p * q, residual[0]):
            return self.dense(x, *residual)
        rest, about = residual[0], residual[1:]
        rest = None if rest is None else rest.permute(0, 2, 3, 1).reshape(-1, self.n)
        direct = self.parts is not None or suits_onednn(self.known, self.weight, self.window, b * p * q)
        step = max(1, COPIED // max(1, p * q * (4 * self.n if direct else self.k * self.window.groups + 4 * self.n)))
        if 0 < b <= step:
            return self._rows(x, (rest, *about), direct).view(b, p, q, self.n).permute(0, 3, 1, 2)
        y = empty_image(x, self.n, self.window, self.dtype if self.out[0] is None else torch.int8)
        rows = y.permute(0, 2, 3, 1)
        for first in range(0, b if y.numel() else 0, step):
            part = None if rest is None else rest[first * p * q : (first + step) * p * q]
            place = rows[first : first + step]
            place.copy_(self._rows(x[first : first + step], (part, *about), direct).view(place.shape))
        return y

    def _suits_dense(self, pixels: int, residual: Tensor | None) -> bool:
        few = not multiplies_int8() or pixels * self.n * self.k <= DENSE_UP_TO
        return self.has_dense and few and pixels > 0 and self.finish is not None and self.finish.takes(residual)

    @cached_property
    def dense(self) -> Dense:
        assert self.finish is not None
        return Dense(self.finish, self.known.codes, self.window)

    def _rows(self, x: Tensor, residual: tuple[Tensor | None, ...], direct: bool) -> Tensor:
        """`[M, O]` of images `[B, C, H, W]`."""
        into: Any = (*residual, *self.out)
        if self.parts is not None:
            sums = fp32_sums(x, self.shift, self.parts, self.window)
        elif direct:
            sums = onednn_sums(x, self.shift, self.known.codes, self.window, self.packs)
        else:
            seen = [_seen(part, self.shift, self.window) for part in x.permute(0, 2, 3, 1).chunk(self.window.groups, 3)]
            if not self.one:
                y = self._by_groups(seen)
                return finish_int8(y, self.x_scale, self.bias, into, self.activation, self.dtype)
            sums = _multiply(seen, self.known.codes)
        if self.finish is not None and self.finish.takes(residual[0]):
            return self.finish(sums, *residual)
        about_y = (self.x_scale, self.bias, self.activation, self.dtype, *into)
        args = (sums, self.known.twice, self.offsets[direct], self.scale, *about_y)
        run: Any = finish_chain
        if (sums.numel() >= COMPILE_FROM or self.calls > EAGER_CALLS) and 1 not in sums.shape:
            args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
            kinds = tuple(a.dtype if isinstance(a, Tensor) else a for a in args)
            run = compiled(finish_chain, kinds, lambda: _example(kinds))
        return call(run, *args)  # type: ignore[no-any-return]

    def _by_groups(self, seen: list[Tensor]) -> Tensor:
        """fp32 `[M, O]`: the sums of all groups of the weight, with their zero points and scales."""
        known, size, n, scale = self.known, self.weight.group_size, self.n, self.weight.scale
        y, last = torch.zeros(seen[0].shape[0], n), scale.shape[1] - 1
        # groups that are one scale in memory are parts of one sum, which is rounded once
        before: Any = 0 if last and scale.stride(1) == 0 else None
        x_before: Any = 0
        for g in range(scale.shape[1]):
            parts = [part[:, g * size : (g + 1) * size].contiguous() for part in seen]
            sums = _multiply(parts, known.codes[:, g * size : (g + 1) * size]) * known.twice
            sums = sums - known.sums[:, g] * self.shift
            x_sums = torch.stack([part.sum(1, dtype=torch.int32) for part in parts], 1)
            x_sums = x_sums.repeat_interleave(n // self.window.groups, 1)  # [M, O]
            if known.zero2 is not None:
                sums = sums + known.zero2[:, g].int() * x_sums
            x_sums = x_sums - self.shift * size
            if before is not None:
                before, x_before = sums.long() + before, x_sums.long() + x_before
                if g < last:
                    continue
                sums, x_sums = before, x_before
            real = sums.float() * 0.5
            if known.rest is not None:
                real = real - known.rest[:, g] * x_sums.float()
            y = y + real * scale[:, g].float()
        return y


def _padding_code(x_zero: Tensor | None) -> int:
    """The zero point of x, which pads it: a code."""
    must = "a whole number from -128 to 127"
    value = whole_zero("qconv2d_int8", x_zero, must)
    if not -128 <= value <= 127:
        raise ValueError(f"qconv2d_int8: x_zero must be {must}, got {value}")
    return value


def _codes_of(weight: PackedWeight, keep: bool) -> Codes:
    if multiplies_int8() and not multiplies_exactly():
        raise UnsuitableError("products of int8 matrices saturate here")
    return derived(weight, torch.int8, make_codes) if keep else make_codes(weight)


@cache
def multiplies_exactly() -> bool:
    """Whether ATen's product of int8 matrices is exact at the ends of the range: without VNNI, pairs can saturate."""
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    a, b = ends.repeat(32, 64), ends.repeat_interleave(64).repeat(16, 1)
    return torch.equal(int_mm(a, b.t()), (a.long() @ b.long().t()).int())


def _has_one_sum(known: Codes, weight: PackedWeight) -> bool:
    """Whether y follows from one sum of products: no groups along K, no zero points that int8 codes do not hold."""
    return weight.scale.shape[1] == 1 and known.zero2 is None and known.rest is None


def suits_onednn(known: Codes, weight: PackedWeight, window: ConvGeometry, pixels: int) -> bool:
    """Whether its convolution of so many pixels is the faster way, and gives all sums."""
    many = window.groups > 1 or pixels >= PIXELS * weight.shape[0]
    return many and multiplies_int8() and _has_one_sum(known, weight) and convolves_exactly()


@cache
def convolves_exactly() -> bool:
    """Whether there is oneDNN's convolution of 8-bit codes, and it is exact at the ends of the range."""
    x = torch.tensor([-128, 127], dtype=torch.int8).repeat(64).view(1, 64, 1, 2)
    w = torch.tensor([127, -128], dtype=torch.int8).repeat_interleave(64).view(2, 64)
    try:
        got = onednn_sums(x, 3, w, ConvGeometry(1, 1), {})
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(got.double(), (x.double()[0, :, 0].t() - 3) @ w.double().t())


def exact_parts(codes: Tensor, shift: int, window: ConvGeometry) -> list[Tensor] | None:
    """The filters in fp32, `[O, C / groups, R, S]`, in as few parts of the channels as have sums below 2**24.

    None if there is no such part, or groups of channels would need several.
    """
    filters = codes.view(codes.shape[0], window.r, window.s, -1).permute(0, 3, 1, 2).float()
    low, high = 128.0 + shift, 127.0 - shift  # the steps of x reach so far on either side of 0
    above, below = filters.clamp(min=0).sum((2, 3)), filters.clamp(max=0).sum((2, 3)).neg()  # [O, C / groups]
    most = torch.maximum(high * above + low * below, low * above + high * below).double()
    channels = filters.shape[1]
    for count in range(1, channels + 1 if window.groups == 1 else 2):
        step = -(-channels // count)
        if max(float(part.sum(1).max()) for part in most.split(step, 1)) <= WHOLE:
            return [part.contiguous(memory_format=torch.channels_last) for part in filters.split(step, 1)]
    return None


def fp32_sums(x: Tensor, shift: int, parts: list[Tensor], window: ConvGeometry) -> Tensor:
    """fp32 `[M, O]`: sums of `codes * (x - shift)`, rounded once, of images `[B, C, H, W]`."""
    x = x.contiguous(memory_format=torch.channels_last)
    total: Tensor | None = None
    pieces = (x,) if len(parts) == 1 else x.split(parts[0].shape[1], 1)
    for piece, filters in zip(pieces, parts, strict=True):
        steps = to_steps(piece if len(parts) == 1 else piece.contiguous(memory_format=torch.channels_last), shift)
        padding = (window.top, window.left)
        if not window.is_symmetric:
            steps, padding = pad(steps, window.sides), (0, 0)
        sums = conv2d(steps, filters, None, window.stride, padding, window.dilation, window.groups)
        total = sums if len(parts) == 1 else sums.int() if total is None else total.add_(sums.int())
    assert total is not None
    return total.permute(0, 2, 3, 1).reshape(-1, total.shape[1]).float()


def onednn_sums(
    x: Tensor, shift: int, codes: Tensor, window: ConvGeometry, packs: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """fp32 `[M, O]`: sums of `codes * (x - shift)`, rounded once, of images `[B, C, H, W]`.

    packs: the weight as oneDNN packed it for an image of a shape; for one shape at a time.
    """
    if not window.is_symmetric:
        x = pad(x, window.sides, value=shift)
    padding = [window.top, window.left] if window.is_symmetric else [0, 0]
    about: tuple[Any, ...] = (list(window.stride), padding, list(window.dilation), window.groups)
    o, size = codes.shape[0], tuple(x.shape)
    scale = torch.ones(o)
    pack = packs.get(size)
    if pack is None:
        w = codes.view(o, window.r, window.s, -1).permute(0, 3, 1, 2)
        pack = torch.ops.onednn.qconv_prepack(w, scale, 1.0, shift + 128, *about, list(size))
        packs.clear()
        packs[size] = pack
    shifted = (x.contiguous(memory_format=torch.channels_last).view(torch.uint8) ^ 128, 1.0, shift + 128)
    zeros = torch.zeros(o, dtype=torch.int64)
    none: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    y = torch.ops.onednn.qconv2d_pointwise(*shifted, pack, scale, zeros, None, *about, *none)
    return y.permute(0, 2, 3, 1).reshape(-1, o)


def _seen(x: Tensor, shift: int, window: ConvGeometry) -> Tensor:
    """`[M, K]` of images `[B, H, W, C / groups]`, rows contiguous: a view if y is a product of x as it is."""
    b, h, w, c = x.shape
    p, q = window.output(h, w)
    if any(window.sides):
        x = pad(x, (0, 0, *window.sides), value=shift)
    if not window.is_pointwise:
        sb, sh, sw, sc = x.stride()
        sizes = (b, p, q, window.r, window.s, c)
        strides = (sb, sh * window.stride_h, sw * window.stride_w, sh * window.dilation_h, sw * window.dilation_w, sc)
        x = x.as_strided(sizes, strides, x.storage_offset())
    return x.reshape(b * p * q, -1).contiguous()


def _multiply(seen: list[Tensor], codes: Tensor) -> Tensor:
    """int32 `[M, O]`, exact."""
    products = [product_of_codes(a, w) for a, w in zip(seen, codes.chunk(len(seen)), strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def finish_chain(
    sums: Tensor,
    twice: int,
    shift: Tensor,
    scale: Tensor,
    x_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    *into: Any,
) -> Tensor:
    """`[M, O]` from the sums of one group."""
    return finish_int8(
        (sums * twice + shift).float() * 0.5 * scale.float(), x_scale, bias, tuple(into), activation, dtype
    )


def _example(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    m, o = 1021, 131
    sizes = ((m, o), (), (o,), (o,), (1,), (o,), (), (), (m, o), (1,), (1,), (1,), (1,), (1,))
    return tuple(
        torch.ones(size, dtype=kind) if size and kind is not None else kind
        for kind, size in zip(kinds, sizes, strict=True)
    )
