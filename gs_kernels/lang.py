"""Triton helpers that kernels share. All arithmetic is fp32; callers cast at the store."""

import triton
import triton.language as tl
from triton import constexpr_function

# gs_kernels/fake_quant/rows.py says what these four mean
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
    """v to the nearest integer, |v| <= 2**22."""
    return (v + MAGIC) - MAGIC


@triton.jit
def clamp(v, low, high):
    """v in [low, high]; NaN stays NaN."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of this program: its rows, its first column, its columns from there, and which of both exist."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK_N)
    offs_m = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M] int64
    first = pid % tiles * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N] int32
    return offs_m, first, offs_n, offs_m < M, offs_n < N - first


@triton.jit
def row_starts(offs_m, N, per, stride_outer, stride_inner, STRIDED: tl.constexpr):
    """Where rows begin in memory: see gs_kernels/fake_quant/rows.py."""
    if STRIDED:
        starts = offs_m // per * stride_outer + offs_m % per * stride_inner
    else:
        starts = offs_m * N
    return starts


@triton.jit
def load_channel(ptr, offs_m, first, offs_n, mask_m, mask_n, C, BY: tl.constexpr):
    """The value of each element's channel, shaped to broadcast against [BLOCK_M, BLOCK_N]; 1 outside."""
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
    """1 / scale, correctly rounded; NaN if scale or zero is out of range."""
    valid = (scale >= SCALE_MIN) & (scale <= SCALE_MAX) & (tl.abs(zero) <= ZERO_MAX)
    return tl.where(valid, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), float("nan"))


@triton.jit
def steps(x, inv, zero, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """x / s, and the level of x before clamping. Both saturate two steps outside the grid, so that rounding is exact.

    The clamp between product and sum also keeps compilers from contracting them.
    """
    zi = round_half_even(zero)
    t = clamp(x * inv, QMIN - 2 - zi, QMAX + 2 - zi)
    return t, ((t + (zero - zi)) + MAGIC) - (MAGIC - zi)  # round(t + zero - zi) + zi, all integers below 2**24


@triton.jit
def reduce_range(x, mask, axis: tl.constexpr):
    """Smallest and largest of x along axis (None: of all), NaN if there is one."""
    nan = tl.max(tl.where(mask & (x != x), 1, 0), axis) > 0
    low = tl.min(tl.where(mask, x, float("inf")), axis)
    high = tl.max(tl.where(mask, x, float("-inf")), axis)
    return tl.where(nan, float("nan"), low), tl.where(nan, float("nan"), high)


@triton.jit
def qparams(low, high, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr):
    """scale and zero of a range, as `choose_qparams_ref`. ZERO: the zero of a symmetric grid."""
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


@constexpr_function
def field_places(bits, mantissa, least):
    """For each field of a 16-bit container: how far to shift right, and which bit of a float's mantissa it then is at.

    With as few shifts as possible, at bit `least` or above; then as high as possible, where the float that holds the
    field is small. A shift can be negative.
    """
    places, first, room = (), 0, mantissa - bits
    fields = [j * bits for j in range(16 // bits)]
    while first < len(fields):
        run = [at for at in fields[first:] if at - fields[first] <= room - least]
        shift = 0 if fields[first] >= least and run[-1] <= room else run[-1] - room
        places += tuple((shift, at - shift) for at in run)
        first += len(run)
    return places


@constexpr_function
def field_offset(bits, mantissa, least, j):
    """What `field_asm` adds to field j: the float whose mantissa steps by 1 at the bit where the field is."""
    return float(2 ** (mantissa - field_places(bits, mantissa, least)[j][1]))


@constexpr_function
def field_asm(bits, mantissa, least):
    """PTX: each field of two containers in a register to two floats `code + offset`, one logic operation a field."""
    places = field_places(bits, mantissa, least)
    source, bias = f"${len(places)}", 15 if mantissa == 10 else 127
    shifts = sorted({shift for shift, _ in places if shift != 0})
    names = {shift: f"t{i}" for i, shift in enumerate(shifts)}
    lines = []
    for shift in shifts:
        move = (
            f"shr.u32 {names[shift]}, {source}, {shift}" if shift > 0 else f"shl.b32 {names[shift]}, {source}, {-shift}"
        )
        lines.append(f".reg .b32 {names[shift]}; {move};")
    for j in range(len(places)):
        shift, at = places[j]
        mask = ((1 << bits) - 1) << at
        exponent = (bias + mantissa - at) << mantissa
        word = names.get(shift, source)
        lines.append(f"lop3.b32 ${j}, {word}, 0x{mask * 0x10001:08x}, 0x{exponent * 0x10001:08x}, 0xea;")  # (a & b) | c
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def field_constraints(bits):
    return ",".join(["=r"] * (16 // bits) + ["r"])


@constexpr_function
def mantissa_bits(dtype):
    """Of a 16-bit float, 0 of another."""
    return {"fp16": 10, "bf16": 7}.get(str(dtype), 0)


@triton.jit
def concat(a, b):
    """`[R, C]` and `[R, C]` side by side: `[R, 2C]`. Costs nothing where a thread holds both."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def float_fields(words, BITS: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """`code + field_offset` of every field as the bits of a 16-bit float: a tuple of `[R, 8 * BITS]`."""
    ASM: tl.constexpr = field_asm(BITS, MANTISSA, LEAST)
    REGISTERS: tl.constexpr = field_constraints(BITS)
    if BITS == 8:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int16,) * 2, is_pure=True, pack=2)
    elif BITS == 4:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int16,) * 4, is_pure=True, pack=2)
    elif BITS == 2:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int16,) * 8, is_pure=True, pack=2)
    else:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int16,) * 16, is_pure=True, pack=2)
    return fields


@triton.jit
def load_grid(scale_ptr, zero_ptr, offs, ZERO: tl.constexpr):
    """Scale and zero point at offs, fp32. ZERO: the zero of all where zero_ptr is None."""
    scale = tl.load(scale_ptr + offs).to(tl.float32)
    if zero_ptr is None:
        zero = tl.full(scale.shape, ZERO, tl.float32)
    else:
        zero = tl.load(zero_ptr + offs).to(tl.float32)
    return scale, zero


@constexpr_function
def zero_kind(zero, bits, mantissa, asm):
    """How a zero point known beforehand is subtracted exactly: 0 if whole, 1 if in half steps, -1 if it cannot be.

    A half needs fields one bit up in the mantissa, where `offset + zero` has room for it.
    """
    if float(zero).is_integer():
        return 0
    return 1 if float(2 * zero).is_integer() and 0 <= zero <= 2**bits and (mantissa >= bits or not asm) else -1


@triton.jit
def _field(
    words,
    floats,
    scale,
    zero,
    grid,
    J: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Field J of each container, `[R, 8 * BITS]`, as `code - zero` or, if SCALED, `(code - zero) * scale`."""
    scale_ptr, zero_ptr, levels_ptr, offs_n, stride_sg, k, G = grid
    WIDTH: tl.constexpr = 8 * BITS
    if GROUP % 128 != 0:
        # groups end inside a block: between two fields or, with 8 bits, inside one
        if GROUP % WIDTH == 0:
            group = tl.minimum((k + J * WIDTH) // GROUP, G - 1)
            scale, zero = load_grid(scale_ptr, zero_ptr, offs_n + group * stride_sg, ZERO)
            scale, zero = scale[:, None], zero[:, None]
        else:
            group = tl.minimum((k + J * WIDTH + tl.arange(0, WIDTH)) // GROUP, G - 1)
            scale, zero = load_grid(scale_ptr, zero_ptr, offs_n[:, None] + (group * stride_sg)[None, :], ZERO)
    KIND: tl.constexpr = zero_kind(ZERO, BITS, mantissa_bits(T), ASM) if zero_ptr is None else -1
    near = zero if KIND >= 0 else round_half_even(zero)
    codes = (words >> (J * BITS)).to(tl.int32) & ((1 << BITS) - 1)
    if levels_ptr is not None:
        v = tl.load(levels_ptr + codes).to(T)
    elif not ASM:
        v = (codes.to(tl.float32) - near).to(T)
    elif mantissa_bits(T) >= BITS:
        OFFSET: tl.constexpr = field_offset(BITS, mantissa_bits(T), 1 if KIND == 1 else 0, J)
        v = floats[J].to(T, bitcast=True) + (-OFFSET - near).to(T)
    else:
        # as the mantissa of 2**23
        v = ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + near)).to(T)
    # what is left of the zero point goes in with the scale, where it rounds least
    if SCALED and KIND >= 0:
        v = v * scale.to(T)
    elif SCALED:
        v = tl.fma(v, tl.broadcast_to(scale.to(T), v.shape), tl.broadcast_to(((near - zero) * scale).to(T), v.shape))
    elif KIND < 0:
        v = v + (near - zero).to(T)
    return v


@triton.jit
def _fields(
    words,
    floats,
    scale,
    zero,
    grid,
    J: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Fields J to J + COUNT of each container side by side."""
    HALF: tl.constexpr = COUNT // 2
    if COUNT == 1:
        v = _field(words, floats, scale, zero, grid, J, BITS, GROUP, ZERO, T, ASM, SCALED)
    else:
        low = _fields(words, floats, scale, zero, grid, J, HALF, BITS, GROUP, ZERO, T, ASM, SCALED)
        high = _fields(words, floats, scale, zero, grid, J + HALF, HALF, BITS, GROUP, ZERO, T, ASM, SCALED)
        v = concat(low, high)
    return v


@triton.jit
def dequantize_block(
    words,
    grid,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A block of 128 codes of each row, planar containers `[R, 8 * BITS]`, as `[R, 128]` in T, and its scales.

    If SCALED, values are `(code - zero) * scale`; else `code - zero`, and `scale`, `[R, 1]` fp32, is still to be
    applied, which needs GROUP to be a multiple of 128.

    Args:
        grid: (scale_ptr, zero_ptr or None, levels_ptr or None, offs_n, stride_sg, k, G): offs_n `[R]` is where the
            scales of each row begin, k the first column of the block, G the number of groups.
        ZERO: the zero point of all where zero_ptr is None.
        T: fp32, or fp16 / bf16: then `code - zero` is exact for zeros in whole steps and, if ZERO, half steps, and the
            product with the scale rounds once.
        ASM: one logic operation a code by inline PTX; else plain shifts, for other GPUs and the interpreter.
    """
    tl.static_assert(GROUP % 32 == 0)
    tl.static_assert(SCALED or GROUP % 128 == 0)
    scale_ptr, zero_ptr, levels_ptr, offs_n, stride_sg, k, _ = grid
    scale, zero = load_grid(scale_ptr, zero_ptr, offs_n + k // GROUP * stride_sg, ZERO)
    scale, zero = scale[:, None], zero[:, None]
    if ASM and mantissa_bits(T) >= BITS and levels_ptr is None:
        KIND: tl.constexpr = zero_kind(ZERO, BITS, mantissa_bits(T), ASM) if zero_ptr is None else -1
        floats = float_fields(words, BITS, mantissa_bits(T), 1 if KIND == 1 else 0)
    else:
        floats = (words,)
    values = _fields(words, floats, scale, zero, grid, 0, 16 // BITS, BITS, GROUP, ZERO, T, ASM, SCALED)
    return values, scale


@constexpr_function
def code_middle(bits, fp8, asm):
    """What `code_block` subtracts from a code: the zero point of a symmetric grid, or nothing."""
    return 0.0 if fp8 and asm else 0.5 if bits == 1 else float(2 ** (bits - 1))


@constexpr_function
def code_factor(bits, fp8, asm):
    """What `code_block` multiplies that difference by, a power of two."""
    if not asm:
        return 2.0 if bits == 1 else 1.0
    return 2.0**-9 if fp8 else 128.0 if bits == 1 else float(2 ** (8 - bits))


@constexpr_function
def code_asm(bits, fp8):
    """PTX: each field of four containers in two registers to four bytes in one.

    int8: at the top of the byte, its highest bit flipped: `(code - 2**(bits - 1)) * 2**(8 - bits)`; of 1 bit, ±64.
    fp8: at the bottom, where float8_e4m3 counts in steps of 2**-9 up to 15.
    """
    count, low = 16 // bits, (1 << bits) - 1
    words = f"${count}, ${count + 1}"
    lines = [f".reg .b32 a, b, t; prmt.b32 a, {words}, 0x6420; prmt.b32 b, {words}, 0x7531;"]
    for j in range(count):
        byte, at = ("a", j * bits) if j * bits < 8 else ("b", j * bits - 8)
        if fp8:
            lines.append(f"shr.u32 t, {byte}, {at}; and.b32 ${j}, t, 0x{low * 0x01010101:08x};")
        else:
            flip = 0xC0C0C0C0 if bits == 1 else 0x80808080
            top = (low << (8 - bits)) * 0x01010101
            lines.append(f"shl.b32 t, {byte}, {8 - bits - at};")
            lines.append(f"lop3.b32 ${j}, t, 0x{top:08x}, 0x{flip:08x}, 0x6a;")  # (a & b) ^ c
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def code_constraints(bits):
    return ",".join(["=r"] * (16 // bits) + ["r", "r"])


@triton.jit
def byte_fields(words, BITS: tl.constexpr, FP8: tl.constexpr):
    """`code_asm` of every container: a tuple of int8 `[R, 8 * BITS]`."""
    ASM: tl.constexpr = code_asm(BITS, FP8)
    REGISTERS: tl.constexpr = code_constraints(BITS)
    if BITS == 8:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int8,) * 2, is_pure=True, pack=4)
    elif BITS == 4:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int8,) * 4, is_pure=True, pack=4)
    elif BITS == 2:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int8,) * 8, is_pure=True, pack=4)
    else:
        fields = tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=(tl.int8,) * 16, is_pure=True, pack=4)
    return fields


@triton.jit
def _codes(words, fields, J: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    HALF: tl.constexpr = COUNT // 2
    if COUNT > 1:
        low = _codes(words, fields, J, HALF, BITS, T, ASM)
        v = concat(low, _codes(words, fields, J + HALF, HALF, BITS, T, ASM))
    elif ASM:
        v = fields[J].to(T, bitcast=True)
    else:
        FACTOR: tl.constexpr = code_factor(BITS, False, False)
        SHIFT: tl.constexpr = code_middle(BITS, False, False) * FACTOR
        q = (words >> (J * BITS)).to(tl.int32) & ((1 << BITS) - 1)
        v = (q * int(FACTOR) - int(SHIFT)).to(tl.int8).to(T)
    return v


@triton.jit
def code_block(words, BITS: tl.constexpr, T: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """A block of 128 codes of each row, planar containers `[R, 8 * BITS]`, as `(code - middle) * factor`, `[R, 128]`.

    Exact in T: int8 or, with FP8, float8e4nv for at most 4 bits. ASM: by inline PTX, half an operation a code.
    """
    if ASM:
        fields = byte_fields(words, BITS, FP8)
    else:
        fields = (words,)
    return _codes(words, fields, 0, 16 // BITS, BITS, T, ASM)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """none, relu (NaN stays NaN), gelu (exact) or silu of fp32."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    return v
