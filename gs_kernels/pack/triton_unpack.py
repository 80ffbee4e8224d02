"""Unpacks planar blocks of 128 codes to floats or 8-bit codes in registers, for every kernel that reads them."""

import math

import triton
import triton.language as tl
from triton import constexpr_function

from gs_kernels.triton_lib import round_half_even


@constexpr_function
def field_places(bits, mantissa, least):
    """Tells for each field of a 16-bit container how far to shift right, and which bit of the float it then is at.

    With as few shifts as possible, at bit `least` or above; then as high as possible. A shift can be negative. In a
    bf16 (mantissa 7) bit 7 is free too: below the exponent's second bit, floats are whole numbers of 2**-133.
    """
    places, first, room = (), 0, (8 if mantissa == 7 else mantissa) - bits
    fields = [j * bits for j in range(16 // bits)]
    while first < len(fields):
        run = [at for at in fields[first:] if at - fields[first] <= room - least]
        shift = 0 if fields[first] >= least and run[-1] <= room else run[-1] - room
        places += tuple((shift, at - shift) for at in run)
        first += len(run)
    return places


@constexpr_function
def field_offset(bits, least, j):
    """Returns what `field_asm` adds to field j in fp16: the float whose mantissa steps by 1 at the field's bit."""
    return float(2 ** (10 - field_places(bits, 10, least)[j][1]))


@constexpr_function
def field_factor(bits, j, step):
    """Returns what makes field j of `field_asm` in bf16 its code, in steps of `step`."""
    return step * 2.0 ** (133 - field_places(bits, 7, 0)[j][1])


@constexpr_function
def field_asm(bits, mantissa, least):
    """Writes PTX that turns each field of two containers in a register into two floats, one logic operation a field.

    fp16: `code + field_offset`. bf16: `code / field_factor`, a float with or without a leading one.
    """
    places = field_places(bits, mantissa, least)
    source = f"${len(places)}"
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
        word, mask = names.get(shift, source), (((1 << bits) - 1) << at) * 0x10001
        if mantissa == 7:
            lines.append(f"and.b32 ${j}, {word}, 0x{mask:08x};")
        else:
            exponent = ((25 - at) << 10) * 0x10001
            lines.append(f"lop3.b32 ${j}, {word}, 0x{mask:08x}, 0x{exponent:08x}, 0xea;")  # (a & b) | c
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def sign_asm(mantissa):
    """Writes PTX that turns each bit of two containers in a register into the signs of two floats: 1.0 and -1.0."""
    minus = 0xBC00 if mantissa == 10 else 0xBF80
    lines = [".reg .b32 t;"]
    for j in range(16):
        lines.append(f"shl.b32 t, $16, {15 - j};")
        lines.append(f"lop3.b32 ${j}, t, 0x80008000, 0x{minus * 0x10001:08x}, 0x6a;")  # (a & b) ^ c
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def e2m1_factor(mantissa):
    """Returns what makes a 4-bit float of its bits in those of another: its exponents are so much less than theirs."""
    return 2.0**14 if mantissa == 10 else 2.0**126


@constexpr_function
def e2m1_asm(mantissa):
    """Writes PTX that turns each field of two containers in a register into two floats: e2m1 over `e2m1_factor`.

    The sign of a field goes to that of the float, its other three bits to the last of the exponent and the first of the
    mantissa.
    """
    lines, at = [".reg .b32 s, t;"], mantissa - 1
    for j in range(4):
        lines += [
            f"{'shl.b32' if to >= 0 else 'shr.u32'} {name}, $4, {abs(to)};"
            for name, to in (("s", 12 - 4 * j), ("t", at - 4 * j))
        ]
        lines.append(f"and.b32 t, t, 0x{(7 << at) * 0x10001:08x};")
        lines.append(f"lop3.b32 ${j}, s, 0x80008000, t, 0xea;")  # (a & b) | c
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def field_constraints(bits):
    return ",".join(["=r"] * (16 // bits) + ["r"])


@constexpr_function
def mantissa_bits(dtype):
    """Returns the mantissa bits of a 16-bit float, 0 of another."""
    return {"fp16": 10, "bf16": 7}.get(str(dtype), 0)


@triton.jit
def concat(a, b):
    """Puts `[R, C]` and `[R, C]` side by side: `[R, 2C]`. Costs nothing where a thread holds both."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def repeat(a, TIMES: tl.constexpr):
    """Repeats each column of `[R, C]`: `[R, C * TIMES]`."""
    return tl.reshape(tl.broadcast_to(a[:, :, None], (a.shape[0], a.shape[1], TIMES)), (a.shape[0], a.shape[1] * TIMES))


@triton.jit
def float_fields(words, BITS: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, SIGN: tl.constexpr):
    """Turns every field into the bits of a 16-bit float, by `field_asm` or, if SIGN, ±1: a tuple of `[R, 8 * BITS]`."""
    ASM: tl.constexpr = sign_asm(MANTISSA) if SIGN else field_asm(BITS, MANTISSA, LEAST)
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
def e2m1_fields(words, MANTISSA: tl.constexpr):
    """Turns every field into the bits of a 16-bit float by `e2m1_asm`: a tuple of `[R, 32]`."""
    ASM: tl.constexpr = e2m1_asm(MANTISSA)
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [words], dtype=(tl.int16,) * 4, is_pure=True, pack=2)


@triton.jit
def e2m1(words, floats, J: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Returns field J of each container of 4-bit floats, `[R, 32]` in T, exact."""
    if ASM and mantissa_bits(T) > 0:
        v = floats[J].to(T, bitcast=True) * tl.full((1, 1), e2m1_factor(mantissa_bits(T)), T)
    else:
        codes = (words >> (4 * J)).to(tl.int32)
        bits = ((codes & 7) << 22) | ((codes & 8) << 28)
        v = (bits.to(tl.float32, bitcast=True) * e2m1_factor(0)).to(T)
    return v


@constexpr_function
def is_e2m1(scale):
    """Says whether scales of a dtype are bytes, as those of 4-bit floats are."""
    return str(scale) in ("uint8", "int8")


@triton.jit
def load_scale(scale_ptr, offs):
    """Loads scales at offs, fp32. Bytes without a sign are e8m0, those with one e4m3: as integers on every GPU."""
    scale = tl.load(scale_ptr + offs)
    if scale_ptr.dtype.element_ty == tl.uint8:
        bits = scale.to(tl.int32)
        real = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)  # 2**-127 has no exponent
    elif scale_ptr.dtype.element_ty == tl.int8:
        bits = scale.to(tl.int32)
        # the exponent as one of fp32, which is 120 less than it should be
        size = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 2.0**120
        real = tl.where(bits < 0, -size, size)
    else:
        real = scale.to(tl.float32)
    return real


@triton.jit
def load_grid(scale_ptr, zero_ptr, offs, ZERO: tl.constexpr):
    """Loads scale and zero point at offs, fp32. ZERO: the zero of all where zero_ptr is None."""
    scale = load_scale(scale_ptr, offs)
    if zero_ptr is None:
        zero = tl.full(scale.shape, ZERO, tl.float32)
    else:
        zero = tl.load(zero_ptr + offs).to(tl.float32)
    return scale, zero


@constexpr_function
def zero_kind(zero, bits, mantissa, asm):
    """Tells how a constant zero point is subtracted exactly: 0 if whole, 1 if in half steps, -1 if it cannot be.

    A half needs one bit more than the code: in fp16, fields one bit up in the mantissa.
    """
    if float(zero).is_integer():
        return 0
    return 1 if float(2 * zero).is_integer() and 0 <= zero <= 2**bits and (mantissa >= bits or not asm) else -1


@constexpr_function
def is_sign(zero, known, bits, mantissa, asm):
    """Says whether values are ±scale / 2, and made as ±1: one operation less a code."""
    return known and asm and bits == 1 and mantissa > 0 and float(zero) == 0.5


@constexpr_function
def step_of(zero, levels, known, bits, mantissa, asm):
    """Returns what `code - zero` is multiplied by before its scale: by assembly, ±1 of a bit, and 2**-6 in bf16.

    2**133 is no float, and would be the factor of the lowest field.
    """
    if is_sign(zero, known and not levels, bits, mantissa, asm):
        return 2.0
    return 2.0**-6 if asm and not levels and mantissa == 7 else 1.0


@constexpr_function
def weight_unit(zero, known, dtype, asm, scaled):
    """Returns what sums of products with values of `dequantize_block` are to be multiplied by: 2**32 or 1.

    In bf16, `code * scale - zero * scale` is one operation that rounds once if `zero * scale` is exact: if zero is a
    power of two. By 2**32 smaller, since 2**133 * scale is the factor of the lowest field.
    """
    power = float(zero).is_integer() and math.frexp(abs(zero))[0] in (0.0, 0.5)
    return 2.0**32 if known and asm and scaled and mantissa_bits(dtype) == 7 and power else 1.0


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
    """Returns field J of each container, `[R, 8 * BITS]`, as `code - zero` or, if SCALED, `(code - zero) * scale`."""
    scale_ptr, zero_ptr, levels_ptr, offs_n, stride_sg, k, G = grid
    WIDTH: tl.constexpr = 8 * BITS
    if GROUP % 128 != 0:
        # groups end inside a block: between two fields or, with 8 bits, inside one
        if GROUP % WIDTH == 0:
            group = tl.minimum((k + J * WIDTH) // GROUP, G - 1)
            scale, zero = load_grid(scale_ptr, zero_ptr, offs_n + group * stride_sg, ZERO)
            scale, zero = scale[:, None], zero[:, None]
        else:
            PART: tl.constexpr = 32 if GROUP % 32 == 0 else 16
            group = tl.minimum((k + J * WIDTH + PART * tl.arange(0, WIDTH // PART)) // GROUP, G - 1)
            scale, zero = load_grid(scale_ptr, zero_ptr, offs_n[:, None] + (group * stride_sg)[None, :], ZERO)
            scale, zero = repeat(scale, PART), repeat(zero, PART)
    SIGN: tl.constexpr = is_sign(ZERO, zero_ptr is None and levels_ptr is None, BITS, mantissa_bits(T), ASM)
    KIND: tl.constexpr = zero_kind(ZERO, BITS, mantissa_bits(T), ASM) if zero_ptr is None else -1
    UNIT: tl.constexpr = weight_unit(ZERO, zero_ptr is None and levels_ptr is None, T, ASM, SCALED)
    near = zero if KIND >= 0 else round_half_even(zero)
    STEP: tl.constexpr = step_of(ZERO, levels_ptr is not None, zero_ptr is None, BITS, mantissa_bits(T), ASM)
    rest = (near - zero) * (scale if SCALED else STEP)
    codes = (words >> (J * BITS)).to(tl.int32) & ((1 << BITS) - 1)
    if is_e2m1(scale_ptr.dtype.element_ty):
        v = e2m1(words, floats, J, T, ASM)
    elif levels_ptr is not None:
        v = tl.load(levels_ptr + codes).to(T)
    elif not ASM:
        v = (codes.to(tl.float32) - near).to(T)
    elif SIGN:
        v = floats[J].to(T, bitcast=True)
    elif mantissa_bits(T) == 10:
        OFFSET: tl.constexpr = field_offset(BITS, 1 if KIND == 1 else 0, J)
        v = floats[J].to(T, bitcast=True) + (-OFFSET - near).to(T)
    elif mantissa_bits(T) == 7:
        f = floats[J].to(T, bitcast=True)
        FACTOR: tl.constexpr = field_factor(BITS, J, STEP if UNIT == 1 else 1 / UNIT)
        if UNIT != 1:
            factor, term = scale * FACTOR, scale * (-ZERO / UNIT)
        else:
            factor, term = tl.full(scale.shape, FACTOR, tl.float32), -STEP * near
        v = tl.fma(f, tl.broadcast_to(factor.to(T), f.shape), tl.broadcast_to(term.to(T), f.shape))
    else:
        # as the mantissa of 2**23
        v = ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + near)).to(T)
    # what is left of the zero point goes in with the scale, where it rounds least
    if SCALED and KIND >= 0:
        v = v if UNIT != 1 else v * (scale * (1 / STEP)).to(T)
    elif SCALED:
        v = tl.fma(v, tl.broadcast_to((scale * (1 / STEP)).to(T), v.shape), tl.broadcast_to(rest.to(T), v.shape))
    elif KIND < 0:
        v = v + rest.to(T)
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
    """Dequantizes 128 codes of each row, planar containers `[R, 8 * BITS]`, to `[R, 128]` in T; returns its scales too.

    If SCALED, values are `(code - zero) * scale / weight_unit(...)`; else they are still to be multiplied by what is
    returned with them, `[R, 1]` fp32, which needs GROUP to be a multiple of 128.

    Args:
        grid: (scale_ptr, zero_ptr or None, levels_ptr or None, offs_n, stride_sg, k, G): offs_n `[R]` is where the
            scales of each row begin, k the first column of the block, G the number of groups.
        ZERO: the zero point of all where zero_ptr is None.
        T: fp32, or fp16 / bf16: then `code - zero` is exact for zeros in whole steps and, if ZERO, half steps, and the
            product with the scale rounds once. Scales must be in T's range and, in bf16 with `weight_unit` not 1, below
            2**27: else values are infinite or NaN.
        ASM: one logic operation a code by inline PTX; else plain shifts, for other GPUs and the interpreter.
    """
    tl.static_assert(GROUP % 16 == 0)
    tl.static_assert(SCALED or GROUP % 128 == 0)
    scale_ptr, zero_ptr, levels_ptr, offs_n, stride_sg, k, _ = grid
    scale, zero = load_grid(scale_ptr, zero_ptr, offs_n + k // GROUP * stride_sg, ZERO)
    scale, zero = scale[:, None], zero[:, None]
    MANTISSA: tl.constexpr = mantissa_bits(T)
    SIGN: tl.constexpr = is_sign(ZERO, zero_ptr is None and levels_ptr is None, BITS, MANTISSA, ASM)
    KIND: tl.constexpr = zero_kind(ZERO, BITS, MANTISSA, ASM) if zero_ptr is None else -1
    if ASM and MANTISSA > 0 and is_e2m1(scale_ptr.dtype.element_ty):
        floats = e2m1_fields(words, MANTISSA)
    elif not ASM or MANTISSA == 0 or levels_ptr is not None:
        floats = (words,)
    else:
        floats = float_fields(words, BITS, MANTISSA, 1 if KIND == 1 and MANTISSA == 10 else 0, SIGN)
    values = _fields(words, floats, scale, zero, grid, 0, 16 // BITS, BITS, GROUP, ZERO, T, ASM, SCALED)
    STEP: tl.constexpr = step_of(ZERO, levels_ptr is not None, zero_ptr is None, BITS, MANTISSA, ASM)
    return values, scale * (1 / STEP)


@constexpr_function
def code_middle(bits):
    """Returns what `code_block` subtracts from a code: the zero point of a symmetric grid."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


@constexpr_function
def code_factor(bits, fp8, asm):
    """Returns what `code_block` multiplies that difference by, a power of two."""
    if not asm:
        return 2.0 if bits == 1 else 1.0
    unit = 2.0**-9 if fp8 else 64.0 if bits == 1 else float(2 ** (8 - bits))
    return 2 * unit if bits == 1 else unit


@constexpr_function
def code_asm(bits, fp8, halves=False):
    """Writes PTX that turns each field of four containers in two registers into four bytes in one.

    int8: at the top of the byte, its highest bit flipped: `(code - 2**(bits - 1)) * 2**(8 - bits)`; of 1 bit, ±64.
    fp8: `code - 2**(bits - 1)`, of 1 bit ±1, as sign and magnitude at the bottom, where float8_e4m3 counts in steps of
    2**-9 up to 15. Where the highest bit is clear, the magnitude is the other bits flipped, and 1.

    halves: every other field only, from the first or, where the third register is odd, from the second.
    """
    step = 2 * bits if halves else bits
    count, low = 16 // step, (1 << bits) - 1
    high = (low + 1) // 2 * 0x01010101
    rest = high - 0x01010101
    words = f"${count}, ${count + 1}"
    lines = [f".reg .b32 a, b, t, h, s, r; prmt.b32 a, {words}, 0x6420; prmt.b32 b, {words}, 0x7531;"]
    if halves:
        lines.append(f"and.b32 h, ${count + 2}, 1; shr.u32 a, a, h; shr.u32 b, b, h;")
    for j in range(count):
        byte, at = ("a", j * step) if j * step < 8 else ("b", j * step - 8)
        if fp8 and bits == 1:
            lines.append(f"shl.b32 t, {byte}, {7 - at};")
            lines.append(f"lop3.b32 ${j}, t, 0x80808080, 0x01010101, 0xae;")  # (~a & b) | c
        elif fp8:
            lines.append(f"shr.u32 t, {byte}, {at}; lop3.b32 h, t, 0x{high:08x}, 0, 0x0c;")  # ~a & b
            lines.append(f"shr.u32 s, h, {bits - 1}; sub.u32 r, h, s;")
            lines.append(f"lop3.b32 r, t, 0x{rest:08x}, r, 0x6a; mad.lo.u32 ${j}, s, 129, r;")  # (a & b) ^ c
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
def bit_halves(words, FP8: tl.constexpr):
    """Turns every other bit of each container to a byte, one thread the even ones and another the odd: int8 `[R, 16]`.

    Tensor cores take from a thread four neighboring codes, and the four that are 16 further on; bits are 8 apart. With
    all bits of a container in one thread, every byte would go through shared memory.
    """
    ASM: tl.constexpr = code_asm(1, FP8, True)
    REGISTERS: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r"
    words = tl.reshape(tl.broadcast_to(words[:, None, :], (words.shape[0], 2, 8)), (words.shape[0], 16))
    odd = tl.broadcast_to((tl.arange(0, 16) // 8).to(tl.int16)[None, :], words.shape)
    return tl.inline_asm_elementwise(ASM, REGISTERS, [words, odd], dtype=(tl.int8,) * 8, is_pure=True, pack=4)


@triton.jit
def byte_fields(words, BITS: tl.constexpr, FP8: tl.constexpr):
    """Applies `code_asm` to every container: a tuple of int8 `[R, 8 * BITS]`."""
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
def _codes(
    words, fields, J: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr,
):
    HALF: tl.constexpr = COUNT // 2
    if COUNT > 1:
        low = _codes(words, fields, J, HALF, BITS, T, FP8, ASM)
        v = concat(low, _codes(words, fields, J + HALF, HALF, BITS, T, FP8, ASM))
    elif ASM:
        v = fields[J].to(T, bitcast=True)
    else:
        FACTOR: tl.constexpr = code_factor(BITS, False, False)
        SHIFT: tl.constexpr = code_middle(BITS) * FACTOR
        q = (words >> (J * BITS)).to(tl.int32) & ((1 << BITS) - 1)
        v = q * int(FACTOR) - int(SHIFT)
        v = v.to(tl.float32).to(T) if FP8 else v.to(T)
    return v


@triton.jit
def code_block(words, BITS: tl.constexpr, T: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr, HALVES: tl.constexpr):
    """Unpacks 128 codes of each row, planar containers `[R, 8 * BITS]`, to `(code - middle) * factor`, `[R, 128]`.

    Exact in T: int8 or, with FP8, float8e4nv for at most 4 bits. ASM: by inline PTX, half an operation a code; to
    floats one and a half. HALVES: of 1 bit by `bit_halves`; products of few rows take codes from registers.
    """
    if ASM and BITS == 1 and HALVES:
        fields = bit_halves(words, FP8)
    elif ASM:
        fields = byte_fields(words, BITS, FP8)
    else:
        fields = (words,)
    FIELDS: tl.constexpr = 8 if ASM and BITS == 1 and HALVES else 16 // BITS
    return _codes(words, fields, 0, FIELDS, BITS, T, FP8, ASM)
