"""Collects Triton helpers that kernels share. All arithmetic is fp32; callers cast at the store."""

import triton
import triton.language as tl

# gs_kernels/fake_quant/strided_rows.py says what these four mean
BY_TENSOR = tl.constexpr(0)
BY_ROW = tl.constexpr(1)
BY_COL = tl.constexpr(2)
BY_CYCLE = tl.constexpr(3)
SCALE_MIN = tl.constexpr(2.0**-126)
SCALE_MAX = tl.constexpr(3.4028234663852886e38)
ZERO_MAX = tl.constexpr(2.0**20)
SCALE_FLOOR = tl.constexpr(2.0**-100)

MAGIC = tl.constexpr(1.5 * 2.0**23)  # here fp32 has no fraction left: adding it rounds half to even


@triton.jit
def round_half_even(v):
    """Rounds v to the nearest integer, |v| <= 2**22."""
    return (v + MAGIC) - MAGIC


@triton.jit
def clamp(v, low, high):
    """Limits v to [low, high]; NaN stays NaN."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the rows of this program, its first column, its columns from there, and which rows and columns exist."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK_N)
    offs_m = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M] int64
    first = pid % tiles * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N] int32
    return offs_m, first, offs_n, offs_m < M, offs_n < N - first


@triton.jit
def row_starts(offs_m, N, per, stride_outer, stride_inner, STRIDED: tl.constexpr):
    """Returns where rows begin in memory: see gs_kernels/fake_quant/strided_rows.py."""
    if STRIDED:
        starts = offs_m // per * stride_outer + offs_m % per * stride_inner
    else:
        starts = offs_m * N
    return starts


@triton.jit
def load_channel(ptr, offs_m, first, offs_n, mask_m, mask_n, C, BY: tl.constexpr):
    """Loads the value of each element's channel, shaped to broadcast against [BLOCK_M, BLOCK_N]; 1 outside."""
    if BY == BY_TENSOR:
        v = tl.load(ptr)
    elif BY == BY_ROW:
        v = tl.load(ptr + offs_m, mask=mask_m, other=1.0)[:, None]
    elif BY == BY_CYCLE:
        v = tl.load(ptr + offs_m % C, mask=mask_m, other=1.0)[:, None]
    else:
        v = tl.load(ptr + first + offs_n, mask=mask_n, other=1.0)[None, :]
    return v


@triton.jit
def inverse(scale, zero):
    """Computes 1 / scale, correctly rounded; NaN if scale or zero is out of range."""
    valid = (scale >= SCALE_MIN) & (scale <= SCALE_MAX) & (tl.abs(zero) <= ZERO_MAX)
    return tl.where(valid, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), float("nan"))


@triton.jit
def steps(x, inv, zero, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Computes x / s and the level of x before clamping. Both saturate two steps outside the grid: rounding is exact.

    The clamp between product and sum also keeps compilers from contracting them.
    """
    zi = round_half_even(zero)
    t = clamp(x * inv, QMIN - 2 - zi, QMAX + 2 - zi)
    return t, ((t + (zero - zi)) + MAGIC) - (MAGIC - zi)  # round(t + zero - zi) + zi, all integers below 2**24


@triton.jit
def reduce_range(x, mask, axis: tl.constexpr):
    """Finds the smallest and largest of x along axis (None: of all), NaN if there is one."""
    nan = tl.max(tl.where(mask & (x != x), 1, 0), axis) > 0
    low = tl.min(tl.where(mask, x, float("inf")), axis)
    high = tl.max(tl.where(mask, x, float("-inf")), axis)
    return tl.where(nan, float("nan"), low), tl.where(nan, float("nan"), high)


@triton.jit
def qparams(low, high, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr):
    """Computes scale and zero of a range, as `choose_qparams_ref`. ZERO: the zero of a symmetric grid."""
    mn = tl.minimum(low, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mx = tl.maximum(high, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if SYMMETRIC:
        mx = tl.maximum(-mn, mx, propagate_nan=tl.PropagateNan.ALL)
        mn = -mx
    span = mx - mn
    scale = tl.div_rn(span, tl.full(span.shape, QMAX - QMIN, tl.float32))
    scale = tl.maximum(scale, SCALE_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(span == 0.0, 1.0, scale)
    if SYMMETRIC:
        zero = tl.full(span.shape, ZERO, tl.float32)
    else:
        zero = clamp(round_half_even(QMIN - tl.div_rn(mn, scale)), QMIN, QMAX)
    return scale, zero


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Applies none, relu, relu6, hardswish (NaN stays NaN), gelu (exact) or silu to fp32."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        v = clamp(v, 0.0, 6.0)
    elif ACTIVATION == "hardswish":
        v = v * clamp(v + 3.0, 0.0, 6.0) * 0.16666666666666666
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    return v
