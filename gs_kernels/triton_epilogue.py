"""Applies what follows a sum over K, and first adds the partial sums that split-K leaves.

One of each serves products and convolutions, of floats and of 8-bit codes: what a caller does not give is compiled out.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import load_grid
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import activate, inverse, nearest_level, round_half_even


@triton.jit
def in_units(n, UNIT: tl.constexpr):
    """Tells the compiler that n is a multiple of UNIT: without help it only looks for multiples of 16."""
    return n // UNIT * UNIT


@triton.jit
def pixels(offs_m, M, P, Q):
    """Returns image, row and column of pixels of y; those behind the last are the last: read, not stored."""
    rows = tl.minimum(offs_m, M - 1)
    inside = rows % (P * Q)
    return rows // (P * Q), inside // Q, inside % Q


@constexpr_function
def is_whole(number):
    return float(number).is_integer()


@triton.jit
def twice(part, FACTOR: tl.constexpr):
    """Computes `2 * part / FACTOR`, which is whole, of int32."""
    if FACTOR >= 2:
        part = part // (FACTOR // 2)
    else:
        part = part * 2
    return part


@triton.jit
def split_zero(zero, STEPS: tl.constexpr):
    """Splits a zero point: twice it to 1 / STEPS, int32, and what is left of it, fp32."""
    near2 = round_half_even(zero * STEPS) * (2 // STEPS)
    return near2.to(tl.int32), zero - near2 * 0.5


@triton.jit
def real_sums(
    sums, x_sums, code_sums_ptr, x_zero, n, scale_ptr, zero_ptr, offs, offs_c,
    ZERO: tl.constexpr, MIDDLE2: tl.constexpr, STEPS: tl.constexpr,
):
    """Computes `scale * sum((code - zero) * (x - x_zero))` over a group, fp32, as references and CPUs do.

    Args:
        sums: int32 `[BLOCK_N, BLOCK_M]`, twice `sum((code - middle) * x)`.
        x_sums: int32 `[BLOCK_M]`, of x.
        code_sums_ptr: at offs_c, the sums of the codes of each row, if x_zero, an int32, is not None.
        n: elements of the group.
        scale_ptr, zero_ptr: at offs, `[BLOCK_N]`.
        ZERO: the zero point of all where zero_ptr is None.
        MIDDLE2: twice the middle.
        STEPS: 2 if zero points are part of the exact sums to half steps, as in convolutions; 1 if to whole ones.
    """
    scale, zero = load_grid(scale_ptr, zero_ptr, offs, ZERO)
    near2, fraction = split_zero(zero, STEPS)
    if zero_ptr is not None or 2 * ZERO != MIDDLE2:
        sums += (MIDDLE2 - near2)[:, None] * x_sums[None, :]
    if x_zero is not None:
        sums -= (x_zero * (2 * tl.load(code_sums_ptr + offs_c) - near2 * n))[:, None]
    y = sums.to(tl.float32) * 0.5
    if zero_ptr is not None or not is_whole(STEPS * ZERO):
        if x_zero is not None:
            x_sums -= x_zero * n
        y -= fraction[:, None] * x_sums.to(tl.float32)[None, :]
    return y * scale[:, None]


@triton.jit
def scale_twice(y, offs_n, N, K, scale_ptr, stride_sn, x_zero_ptr, code_sums_ptr, ZERO: tl.constexpr):
    """Computes `scale * sum((code - zero) * (x - x_zero))`, fp32, of y, int32: twice `sum((code - zero) * x)`.

    Args:
        y: `[BLOCK_M, BLOCK_N]`, of one group of K elements. offs_n: of its columns, `[BLOCK_N]`, N of them in all.
        x_zero_ptr, code_sums_ptr: the zero point of x, if it has one, and the sums of the codes of each row.
        ZERO: the zero point of the weight.
    """
    exist = tl.minimum(offs_n, N - 1)
    if x_zero_ptr is not None:
        x_zero = tl.load(x_zero_ptr).to(tl.int32)
        y -= (x_zero * (2 * tl.load(code_sums_ptr + exist) - int(2 * ZERO) * K))[None, :]
    return y.to(tl.float32) * 0.5 * tl.load(scale_ptr + exist * stride_sn).to(tl.float32)[None, :]


def can_split(weight: PackedWeight) -> bool:
    """Says whether partial sums over K add up exactly, as integers do: one group, zero points in half steps."""
    return weight.scale.shape[1] == 1 and not isinstance(weight.zero, Tensor) and is_whole(2 * float(weight.zero))


@triton.jit
def epilogue(
    y, offs_m, offs_n, mask_m, mask_n, image, p, q,
    stride_xs, stride_rb, stride_rc, stride_rh, stride_rw,
    x_scale_ptr, bias_ptr, residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr,
):
    """Makes the result of sums `[BLOCK_M, BLOCK_N]`: `f(y * x_scale + bias + residual)`, or codes of it.

    The order is that of the references. Everything of which the pointer is None is left out.

    Args:
        image, p, q: `[BLOCK_M]`, where the pixels of a residual are; None without one.
        stride_xs: between scales of rows of x; None if there is one for all.
    """
    if x_scale_ptr is not None:
        if stride_xs is None:
            y = y * tl.load(x_scale_ptr)
        else:
            y = y * tl.load(x_scale_ptr + offs_m * stride_xs, mask=mask_m, other=0.0)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        rows = image.to(tl.int64) * in_units(stride_rb, UNIT)
        rows += p.to(tl.int64) * in_units(stride_rh, UNIT) + q.to(tl.int64) * in_units(stride_rw, UNIT)
        mask = mask_m[:, None] & mask_n[None, :]
        ptrs = residual_ptr + rows[:, None] + (offs_n.to(tl.int64) * stride_rc)[None, :]
        residual = tl.load(ptrs, mask=mask, other=0.0)
        residual = residual.to(tl.float32)
        if residual_zero_ptr is not None:
            residual = residual - tl.load(residual_zero_ptr)
        if residual_scale_ptr is not None:
            residual = residual * tl.load(residual_scale_ptr)
        y = y + residual
    y = activate(y, ACTIVATION)
    if out_scale_ptr is not None:
        scale = tl.load(out_scale_ptr)
        if out_zero_ptr is None:
            zero = scale * 0.0
        else:
            zero = tl.load(out_zero_ptr)
        level = nearest_level(y, inverse(scale, zero), zero, -128, 127)
        y = tl.where(level == level, level, -128.0)
    return y


@triton.jit
def _reduce_kernel(
    y_ptr,
    partials_ptr, scale_ptr, x_zero_ptr, code_sums_ptr, x_scale_ptr, bias_ptr,
    residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, P, Q, K,
    stride_sn, stride_xs, stride_rb, stride_rc, stride_rh, stride_rw,
    ZERO: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Adds the partials `[SPLIT_K, M, N]` in their order, whatever order they were made in, then the epilogue.

    scale_ptr: of a weight, whose zero point is ZERO, if partials are int32: twice the sums of `(code - zero) * x`.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    N = in_units(N, UNIT_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    y = tl.load(partials_ptr + offs, mask=mask, other=0)
    for _ in tl.static_range(SPLIT_K - 1):
        partials_ptr += tl.cast(M, tl.int64) * N
        y += tl.load(partials_ptr + offs, mask=mask, other=0)
    if scale_ptr is not None:
        y = scale_twice(y, offs_n, N, K, scale_ptr, stride_sn, x_zero_ptr, code_sums_ptr, ZERO)
    if residual_ptr is None:
        image, p, q = None, None, None
    else:
        image, p, q = pixels(offs_m, M, P, Q)
    y = epilogue(
        y, offs_m, offs_n, mask_m, mask_n, image, p, q,
        stride_xs, stride_rb, stride_rc, stride_rh, stride_rw,
        x_scale_ptr, bias_ptr, residual_ptr, residual_scale_ptr, residual_zero_ptr,
        out_scale_ptr, out_zero_ptr, ACTIVATION, UNIT_N,
    )
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


ELEMENTS = 512  # of a tile
NOTHING = (None, None, None, None, None)  # residual, its scale and zero point, scale and zero point of y


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else tuple(t.stride())


def unit_of(image: Tensor | None, channels: int = 8) -> int:
    """Returns 8 if pixels of an image are a multiple of 8 elements apart, and channels are a multiple of 8, else 1."""
    strides = () if image is None else image.stride()
    return 8 if channels % 8 == 0 and all(n % 8 == 0 for axis, n in enumerate(strides) if axis != 1) else 1


def reduce_partials(
    y: Tensor, partials: Tensor, bias: Tensor | None, activation: str, *,
    weight: tuple[Tensor, float, int] | None = None, x_zero: Tensor | None = None, code_sums: Tensor | None = None,
    x_scale: Tensor | None = None, stride_xs: int | None = None,
    requant: tuple[Tensor | None, ...] = NOTHING,
) -> None:
    """Writes y `[M, N]`, or `[B, N, P, Q]` channels-last, from the partial sums `[SPLIT_K, M, N]`.

    Args:
        weight: scale, zero point and K of the weight that int32 partials still have to be scaled by.
        x_zero, code_sums: of codes x with a zero point.
        x_scale, stride_xs: as `epilogue` takes them.
        requant: residual, its scale and zero point, scale and zero point of y.
    """
    split, m, n = partials.shape
    p, q = (1, 1) if y.dim() == 2 else y.shape[2:]
    scale, zero, k = (None, 0.0, 0) if weight is None else weight
    block_m = power_of_two(m, 4)
    block_n = ELEMENTS // block_m
    launch(
        _reduce_kernel, (-(-m // block_m), -(-n // block_n)),
        y, partials, scale, x_zero, code_sums, x_scale, bias, *requant,
        m, n, p, q, k,
        0 if scale is None else scale.stride(0), stride_xs, *strides_of(requant[0]),
        ZERO=zero, ACTIVATION=activation, SPLIT_K=split, UNIT_N=unit_of(requant[0], n),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )
