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
def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Returns the first row and column of this program, its rows `[1, BLOCK_M, 1]` and columns from there, and masks.

    Elements are `[BLOCK_N / CHUNK, BLOCK_M, CHUNK]`, columns `[BLOCK_N / CHUNK, 1, CHUNK]`: with short chunks a thread
    has several elements of one row, and does once what is done for a row. WHOLE: BLOCK_N covers a row.
    """
    pid = tl.program_id(0)
    if WHOLE:
        first_m = pid.to(tl.int64) * BLOCK_M
        first_n = tl.zeros((), tl.int64)
    else:
        tiles = tl.cdiv(N, BLOCK_N)
        first_m = (pid // tiles).to(tl.int64) * BLOCK_M
        first_n = (pid % tiles).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_M)[None, :, None]
    cols = tl.arange(0, BLOCK_N // CHUNK)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    mask_m = rows < tl.minimum(M - first_m, BLOCK_M).to(tl.int32)
    mask_n = cols < tl.minimum(N - first_n, BLOCK_N).to(tl.int32)
    return first_m, first_n, rows, cols, mask_m, mask_n


@triton.jit
def dense_offsets(first_m, first_n, rows, cols, N):
    """Returns where elements lie in a dense tensor: from its begin to the program's first one, and from there."""
    # rows of a tile that has several are short, but those of tiles by column
    return first_m * N + first_n, rows.to(tl.int64) * N + cols


@triton.jit
def offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED: tl.constexpr):
    """Returns the same in memory as gs_kernels/fake_quant/strided_rows.py describes it."""
    if STRIDED:
        at = first_m + rows
        begin, offs = first_n, at // per * stride_outer + at % per * stride_inner + cols
    else:
        begin, offs = dense_offsets(first_m, first_n, rows, cols, N)
    return begin, offs


@triton.jit
def load_channel(ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY: tl.constexpr):
    """Loads the value of each element's channel, shaped to broadcast against elements; 1 outside."""
    if BY == BY_TENSOR:
        v = tl.load(ptr)
    elif BY == BY_ROW:
        v = tl.load(ptr + first_m + rows, mask=mask_m, other=1.0)
    elif BY == BY_CYCLE:
        v = tl.load(ptr + (first_m + rows) % C, mask=mask_m, other=1.0)
    else:
        v = tl.load(ptr + first_n + cols, mask=mask_n, other=1.0)
    return v


@triton.jit
def inverse(scale, zero):
    """Computes 1 / scale, correctly rounded; NaN if scale or zero is out of range."""
    valid = (scale >= SCALE_MIN) & (scale <= SCALE_MAX) & (tl.abs(zero) <= ZERO_MAX)
    return tl.where(valid, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), float("nan"))


@triton.jit
def nearest_level(x, inv, zero, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Computes the level of x, `clamp(round(x / s + zero - zi) + zi, QMIN, QMAX)` with zi the nearest integer to zero.

    x / s is what is clamped, to where the ends of the grid are: it is rounded to them from there, and rounding keeps
    the order. It also keeps compilers from contracting product and sum. NaN stays NaN.
    """
    zi = round_half_even(zero)
    t = clamp(x * inv, QMIN - zero, QMAX - zero)
    return ((t + (zero - zi)) + MAGIC) - (MAGIC - zi)  # all integers below 2**24


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
def row_range(x, mask):
    """Finds the smallest and largest of each row of the elements of a tile, `[1, BLOCK_M, 1]`, NaN if there is one."""
    nan = tl.max(tl.max(tl.where(mask & (x != x), 1, 0), 0, keep_dims=True), 2, keep_dims=True) > 0
    low = tl.min(tl.min(tl.where(mask, x, float("inf")), 0, keep_dims=True), 2, keep_dims=True)
    high = tl.max(tl.max(tl.where(mask, x, float("-inf")), 0, keep_dims=True), 2, keep_dims=True)
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
