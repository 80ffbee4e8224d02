"""Facts of packed products that no comparison with a reference shows: exactness, edges, errors, assembly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gs_kernels import (
    PerChannel,
    code_sums,
    dequantize_packed,
    dynamic_fake_quant,
    pack_weight,
    qmatmul,
    qmatmul_fp8,
    qmatmul_int8,
    quantize_rows,
    repack,
)
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.aot.report import launches_of
from gs_kernels.formats import E2M1
from gs_kernels.qmatmul.aot_cases import matmul
from gs_kernels.qmatmul.ref import qmatmul_int8_ref, qmatmul_ref
from gs_kernels.qmatmul.tiles import MANY, PAIR, Plan
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms, same_bits
from tests.kernels import ptx


def weight(n=20, k=256, bits=4, group=128, zero=None, dtype=torch.float32, levels=None):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, k // group, generator=generator).add(0.5).to(dtype)
    packed = pack_weight(codes, scale, zero, bits=bits, group_size=group, levels=levels, layout="planar")
    return packed.to(DEVICE)


def normal(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("rows", [1, 24], ids=["few", "many"])
@pytest.mark.parametrize("bits, zero", [(1, 0.5), (2, 1.5), (4, None), (4, 7.5), (8, None), (4, "points")])
def test_a_unit_vector_reads_a_column_of_the_weight_rounded_once(bits, zero, rows):
    """Whole and half zero points are subtracted exactly; with fractions, to the precision of x."""
    points = torch.linspace(0, 15, 40).view(20, 2) if zero == "points" else zero
    w = weight(bits=bits, zero=points, dtype=torch.float16)
    x = torch.zeros(rows, 256, dtype=torch.float16, device=DEVICE)
    columns = torch.arange(rows, device=DEVICE) * 7
    x[torch.arange(rows), columns] = 1
    wanted = dequantize_packed(w, torch.float16)[:, columns].T
    got = qmatmul(x, w)
    if zero == "points":
        torch.testing.assert_close(got, wanted, rtol=2**-9, atol=2**-9)
    else:
        assert same_bits(got, wanted)


@pytest.mark.parametrize("sizes", [(0, 256), (256,), (2, 0, 256), (3, 1, 2, 256)])
def test_any_number_of_rows_and_axes(sizes):
    w, x = weight(), normal(*sizes)
    y = qmatmul(x, w)
    assert y.shape == (*sizes[:-1], 20)
    torch.testing.assert_close(y, qmatmul_ref(x, w), rtol=1e-5, atol=1e-4)
    codes, scale = quantize_rows(x)
    assert codes.shape == sizes and scale.shape == sizes[:-1] and qmatmul_int8(codes, scale, w).shape == y.shape


def test_rows_that_repeat_or_overlap_are_read_as_they_are():
    w, row = weight(), normal(300)
    for x in (row[:256].expand(5, 256), row.unfold(0, 256, 8)):
        torch.testing.assert_close(qmatmul(x, w), qmatmul_ref(x, w), rtol=1e-5, atol=1e-4)


def test_scales_and_zero_points_in_another_order_give_the_same_bits():
    w = weight(zero=torch.linspace(0, 15, 40).view(20, 2))
    turned = replace(w, scale=w.scale.T.contiguous().T, zero=w.zero.T.contiguous().T)
    mixed = replace(w, scale=w.scale.T.contiguous().T)
    x = normal(3, 256)
    assert same_bits(qmatmul(x, w), qmatmul(x, turned)) and same_bits(qmatmul(x, w), qmatmul(x, mixed))


def test_a_canonical_weight_gives_what_a_planar_one_gives():
    w, x = weight(bits=2), normal(3, 256)
    torch.testing.assert_close(qmatmul(x, repack(w, "canonical")), qmatmul(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_reference_up_to_the_second(activation):
    w, bias = weight(6, 64, group=32, zero=3.5), normal(6, seed=1)

    def gradients(run):
        x, b = normal(4, 64).div_(64).requires_grad_(), bias.clone().requires_grad_()
        (dx, db) = torch.autograd.grad(run(x, w, b, activation=activation).square().sum(), (x, b), create_graph=True)
        return dx, db, torch.autograd.grad(dx.square().sum(), x)[0]

    for found, wanted in zip(gradients(qmatmul), gradients(qmatmul_ref), strict=True):
        assert relative_rms(found, wanted) < 1e-5


def test_nothing_but_x_and_bias_gets_a_gradient():
    w = weight()
    w = replace(w, scale=w.scale.requires_grad_())
    assert torch.autograd.grad(qmatmul(normal(2, 256).requires_grad_(), w).sum(), w.scale, allow_unused=True) == (None,)


def test_quantized_rows_are_those_of_dynamic_fake_quant():
    x = normal(9, 500)
    x[3] = 0
    codes, scale = quantize_rows(x)
    y, fake_scale, _ = dynamic_fake_quant(x, qmin=-127, qmax=127, symmetric=True, granularity=PerChannel(0))
    assert same_bits(codes * scale[:, None], y) and same_bits(scale, fake_scale)


def test_a_row_with_nan_or_infinity_becomes_nan_and_no_other():
    x, w = normal(3, 256), weight()
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    codes, scale = quantize_rows(x)
    bad = ~torch.isfinite(qmatmul_int8(codes, scale, w)).all(1)
    assert bad.tolist() == [True, False, True]
    assert torch.isnan(qmatmul(x, w)[0]).all() and torch.isfinite(qmatmul(x, w)[1]).all()


@pytest.mark.parametrize("bits, group", [(8, 512), (4, 128), (2, 256), (1, 64)])
def test_sums_of_8_bit_codes_are_exact_integers(bits, group):
    """Scales of a power of two: the result has no rounding but that of the sum."""
    n, k = 5, 512
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    zero = float(2 ** (bits - 1))
    w = pack_weight(codes, torch.ones(n, k // group), zero, bits=bits, group_size=group, layout="planar").to(DEVICE)
    x = torch.randint(-127, 128, (3, k), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    got = qmatmul_int8(x.to(DEVICE), torch.full((1,), 0.5, device=DEVICE), w)
    assert torch.equal(got.cpu().double(), (x.double() @ (codes.double() - zero).T) / 2)


def test_a_zero_point_of_x_is_undone_by_code_sums():
    w = weight(bits=8, group=256)
    x = torch.randint(-128, 128, (4, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    scale, zero = torch.full((1,), 0.01, device=DEVICE), torch.full((1,), -128.0, device=DEVICE)
    got = qmatmul_int8(x, scale, w, x_zero=zero, code_sums=code_sums(w))
    wanted = qmatmul_int8_ref(x, scale, w, x_zero=zero)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3 * wanted.abs().max().item() / 100)


@pytest.mark.parametrize("zero", ["middle", "of rows", "half"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("m, n, k", [(1, 33, 1100), (17, 70, 200)])
def test_one_scale_a_row_gives_the_bits_of_the_reference(m: int, n: int, k: int, bits: int, zero: str):
    """With partial sums over K and without, of one scale for x and of one for each row of it."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=draw)
    middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    zeros = {"middle": middle, "half": middle + 0.5, "of rows": torch.arange(n).remainder(2**bits).view(-1, 1).float()}
    scale, bias = torch.rand(n, 1, generator=draw) + 0.01, torch.randn(n, generator=draw).to(DEVICE)
    w = pack_weight(codes, scale, zeros[zero], bits=bits, group_size=k, layout="planar").to(DEVICE)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=draw).to(DEVICE)
    for x_scale in (torch.rand(m, generator=draw), torch.rand(1, generator=draw)):
        for x_zero in (None, torch.full((1,), -77.0, device=DEVICE)):
            about = {"x_zero": x_zero, "activation": "relu"}
            sums = None if x_zero is None else code_sums(w)
            got = qmatmul_int8(x, x_scale.to(DEVICE), w, bias, code_sums=sums, **about)
            assert same_bits(got, qmatmul_int8_ref(x, x_scale.to(DEVICE), w, bias, **about))


def test_the_old_sums_of_a_weight_are_deprecated():
    w, x = weight(bits=8, group=256), torch.ones(4, 256, dtype=torch.int8, device=DEVICE)
    scale = torch.full((1,), 0.01, device=DEVICE)
    with pytest.warns(DeprecationWarning, match="weight_sums is no longer used; give code_sums"):
        old = qmatmul_int8(x, scale, w, x_zero=scale * 0 + 3, weight_sums=scale.expand(20))
    assert same_bits(old, qmatmul_int8(x, scale, w, x_zero=scale * 0 + 3))


CALLS = {
    r"last axis of x must be K=256 of the weight \[20, 256\], got \[2, 255\]": lambda w: qmatmul(normal(2, 255), w),
    r"x must be float32 / float16 / bfloat16, got int64; cast x": lambda w: qmatmul(torch.ones(2, 256).long(), w),
    r"weight must be a PackedWeight, got Tensor": lambda w: qmatmul(normal(2, 256), normal(20, 256)),
    r"activation must be one of none, relu, relu6, hardswish, gelu, silu, got 'tanh'": lambda w: qmatmul(
        normal(2, 256), w, activation="tanh"
    ),
    r"bias must have shape \[20\], got \[3\]": lambda w: qmatmul(normal(2, 256), w, normal(3)),
    r"qmatmul_int8: x must be int8, got float32": lambda w: qmatmul_int8(normal(2, 256), normal(2), w),
    r"x_scale must have shape \[2\], one per row of x, or \[1\], got \[3\]": lambda w: qmatmul_int8(
        torch.ones(2, 256, dtype=torch.int8, device=DEVICE), normal(3), w
    ),
    r"code_sums must have shape \[20, 2\], got \[20\]": lambda w: qmatmul_int8(
        torch.ones(2, 256, dtype=torch.int8, device=DEVICE),
        normal(1),
        w,
        x_zero=normal(1),
        code_sums=torch.ones(20, dtype=torch.int32, device=DEVICE),
    ),
    r"dtype must be int8 or float8_e4m3fn, got torch.uint8": lambda w: quantize_rows(normal(2, 8), dtype=torch.uint8),
    r"x must be \[..., K\] with K >= 1, got \[2, 0\]": lambda w: quantize_rows(normal(2, 0)),
}


@pytest.mark.parametrize("words", CALLS)
def test_wrong_calls_say_what_must_hold(words):
    with pytest.raises((TypeError, ValueError), match=words):
        CALLS[words](weight())


def test_8_bit_rows_refuse_what_is_not_exact_in_8_bits():
    w = weight(levels=torch.linspace(-1, 1, 16))
    with pytest.raises(ValueError, match=r"qmatmul_int8: .* evenly spaced grid, got levels; use qmatmul"):
        qmatmul_int8(torch.ones(2, 256, dtype=torch.int8, device=DEVICE), normal(1), w)
    with pytest.raises(ValueError, match=r"qmatmul_fp8: .* evenly spaced grid, got levels; use qmatmul"):
        qmatmul_fp8(normal(2, 256), w)
    with pytest.raises(ValueError, match="must have at most 4 bits, got 8; use qmatmul_int8"):
        qmatmul_fp8(normal(2, 256), weight(bits=8))


kernel = pytest.importorskip(
    "gs_kernels.pack.triton_unpack", reason="Triton is not installed: there is no assembly to run"
)
WORDS = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
CONTAINERS = WORDS.view(np.uint16).reshape(-1, 2)  # [word, container]


def _halves(register, mantissa):
    """The two 16-bit floats of each register, as float64."""
    halves = register.view(np.uint16).reshape(-1, 2)
    floats = halves.view(np.float16) if mantissa == 10 else (halves.astype(np.uint32) << 16).view(np.float32)
    return floats.astype(np.float64)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("least", [0, 1])
def test_assembly_makes_each_field_the_fp16_code_plus_offset(bits, least):
    for j, field in enumerate(ptx.run(kernel.field_asm(bits, 10, least), [WORDS], 16 // bits)):
        code = (CONTAINERS >> (j * bits)) & (2**bits - 1)
        offset = kernel.field_offset(bits, least, j)
        assert np.array_equal(_halves(field, 10), code + offset)
        # at half steps, offset + zero is exact too
        assert offset * (1 + least) <= 2.0 ** (11 - least) and offset >= 2.0**bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_assembly_makes_each_field_the_bf16_code_by_a_power_of_two(bits):
    for j, field in enumerate(ptx.run(kernel.field_asm(bits, 7, 0), [WORDS], 16 // bits)):
        code = (CONTAINERS >> (j * bits)) & (2**bits - 1)
        assert np.array_equal(_halves(field, 7) * kernel.field_factor(bits, j, 1.0), code.astype(np.float64))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("exponent", [-94, -7, 0, 26])
def test_one_bf16_operation_makes_a_weight_of_a_symmetric_grid_with_one_rounding(bits, exponent):
    zero, scale = 2.0 ** (bits - 1), torch.linspace(1, 1.99, 97).bfloat16().double()[:, None] * 2.0**exponent
    unit = kernel.weight_unit(zero, True, "bf16", True, True)
    assert unit != 1 and kernel.weight_unit(zero - 0.5, True, "bf16", True, True) == 1
    wanted = ((torch.arange(2**bits) - zero) * scale).bfloat16().double()  # 16 bits at most before it rounds
    for j, field in enumerate(ptx.run(kernel.field_asm(bits, 7, 0), [WORDS], 16 // bits)):
        codes = (CONTAINERS >> (j * bits)) & (2**bits - 1)
        floats = torch.from_numpy(_halves(field, 7)[[np.argwhere(codes == c)[0, 0] for c in range(2**bits)]])
        floats = floats[torch.arange(2**bits), [np.argwhere(codes == c)[0, 1] for c in range(2**bits)]]
        factor, term = scale * kernel.field_factor(bits, j, 1 / unit), scale * (-zero / unit)
        assert all(torch.equal(t, t.bfloat16().double()) for t in (factor, term))
        assert torch.equal((floats * factor + term).bfloat16().double() * unit, wanted)


@pytest.mark.parametrize("bits, zeros", [(8, (0, 100, 128, 255)), (4, (0, 5, 7.5)), (2, (1.5, 3)), (1, (0, 1))])
def test_one_bf16_operation_makes_a_code_less_its_zero_point(bits, zeros):
    step = kernel.step_of(0.0, False, False, bits, 7, True)
    for j, field in enumerate(ptx.run(kernel.field_asm(bits, 7, 0), [WORDS], 16 // bits)):
        codes, factor = (CONTAINERS >> (j * bits)) & (2**bits - 1), kernel.field_factor(bits, j, step)
        assert factor < 2.0**128
        for zero in zeros:
            terms = torch.from_numpy(_halves(field, 7) * factor - zero * step)
            assert torch.equal(terms.bfloat16().double(), terms)
            assert np.array_equal(terms.numpy() / step, codes.astype(np.float64) - zero)


@pytest.mark.parametrize("mantissa", [10, 7])
def test_assembly_makes_each_field_a_4_bit_float_over_a_power_of_two(mantissa):
    for j, field in enumerate(ptx.run(kernel.e2m1_asm(mantissa), [WORDS], 4)):
        floats = _halves(field, mantissa) * kernel.e2m1_factor(mantissa)
        assert np.array_equal(floats, np.array(E2M1)[(CONTAINERS >> (4 * j)) & 15])


@pytest.mark.parametrize("mantissa", [10, 7])
def test_assembly_makes_each_bit_a_sign(mantissa):
    for j, field in enumerate(ptx.run(kernel.sign_asm(mantissa), [WORDS], 16)):
        assert np.array_equal(_halves(field, mantissa), ((CONTAINERS >> j) & 1) * 2.0 - 1)


@pytest.mark.parametrize("bits, fp8", [(1, True), (2, True), (4, True), (1, False), (2, False), (4, False), (8, False)])
def test_assembly_makes_each_field_a_byte_that_the_tensor_cores_multiply(bits, fp8):
    low, high = WORDS[::2], WORDS[1::2]
    four = np.stack([low, high], 1).view(np.uint16)  # [pair, container]
    fields = ptx.run(kernel.code_asm(bits, fp8), [low, high], 16 // bits)
    for j, field in enumerate(fields):
        code = (four >> (j * bits)) & (2**bits - 1)
        octets = torch.from_numpy(field.view(np.uint8).reshape(-1, 4))
        values = octets.view(torch.float8_e4m3fn if fp8 else torch.int8).double().numpy()
        middle, factor = kernel.code_middle(bits), kernel.code_factor(bits, fp8, True)
        assert np.array_equal(values, (code - middle) * factor)


interpreted = pytest.mark.skipif(not INTERPRET, reason="only TRITON_INTERPRET=1 runs kernels on numpy")


@interpreted
@pytest.mark.parametrize("scale_parts", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("zero", ["whole", "half", "points"])
def test_kernels_with_assembly_give_the_bits_of_plain_ones(bits, zero, scale_parts, emulated_assembly):
    from gs_kernels.qmatmul.kernel import multiply

    middle = float(2 ** (bits - 1))
    points = {"whole": middle, "half": middle - 0.5, "points": torch.linspace(0, 2**bits - 1, 66).view(33, 2)}[zero]
    w = weight(n=33, bits=bits, zero=points, dtype=torch.float16)
    plan, x = Plan(scale_parts=scale_parts), normal(5, 256, dtype=torch.float16)
    plain, asm = (multiply(x, w, None, "none", plan, asm) for asm in (False, True))
    assert same_bits(plain, asm)


@interpreted
@pytest.mark.parametrize("bits, block_m", [(1, 16), (1, 128), (2, 16), (4, 16), (8, 16)])
def test_8_bit_kernels_with_assembly_give_the_bits_of_plain_ones(bits, block_m, emulated_assembly):
    from gs_kernels.qmatmul.kernel import multiply_int8

    w = weight(n=33, bits=bits, zero=torch.linspace(0, 2**bits - 1, 66).view(33, 2))
    codes, scale = quantize_rows(normal(5, 256))
    rest = (None, None, w, None, "none", torch.float32, Plan(block_m=block_m))
    plain, asm = (multiply_int8(codes, scale, *rest, asm) for asm in (False, True))
    assert same_bits(plain, asm)


@interpreted
@pytest.mark.parametrize("zero", ["middle", "points"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_kernels_of_8_bit_floats_with_assembly_give_the_bits_of_plain_ones(bits, zero, emulated_assembly):
    from gs_kernels.qmatmul.kernel import multiply_int8, quantize

    points = {"middle": 2.0 ** (bits - 1) if bits > 1 else 0.5, "points": torch.full((33, 2), 0.25)}[zero]
    w, sums = weight(n=33, bits=bits, zero=points), torch.empty(2, 5)
    x8, scale = quantize(normal(5, 256), torch.float8_e4m3fn, sums)
    rest = (sums, None, w, None, "none", torch.float32, Plan())
    plain, asm = (multiply_int8(x8, scale, *rest, asm) for asm in (False, True))
    assert plain.abs().max() > 1 and same_bits(plain, asm)


NARROW = Plan(block_n=32, scale_parts=True)
SHARES = ((1, 2, 1), (3, 6, 2), (3, 15, 3), (19, 1, 1), (33, 7, 1))  # rows, shares, of them for one SM


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="the kernel runs interpreted or on a GPU")
@pytest.mark.parametrize(
    "m, n, k, plan",
    [
        *((m, 70, 640, replace(NARROW, shares=shares, per_sm=per_sm)) for m, shares, per_sm in SHARES),
        (33, 257, 256, Plan(block_m=64, block_n=256, warps=8, stages=3, shares=3)),
    ],
    ids=lambda one: f"{one.block_n}-{one.shares}-{one.per_sm}" if isinstance(one, Plan) else str(one),
)
def test_shares_of_all_tiles_sum_to_the_whole_and_twice_to_the_same_bits(m, n, k, plan):
    """Shares end inside tiles, at their ends, hold several, or a block."""
    from gs_kernels.qmatmul.kernel import multiply

    w, x, bias, asm = weight(n=n, k=k), normal(m, k, dtype=torch.float16), normal(n), not INTERPRET
    once, twice = (multiply(x, w, bias, "relu", plan, asm) for _ in range(2))
    assert same_bits(once, twice)
    wanted = qmatmul_ref(x, w, bias, activation="relu")
    torch.testing.assert_close(once, wanted, rtol=2e-3, atol=0.1)


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="the kernel runs interpreted or on a GPU")
@pytest.mark.parametrize("k", [256, 320])
def test_a_tile_that_addresses_x_by_offsets_gives_the_bits_of_one_that_does_by_pointers(k):
    from gs_kernels.qmatmul.kernel import multiply

    w, x, asm = weight(n=130, k=k, group=64), normal(133, k + 8, dtype=torch.float16)[:, :k], not INTERPRET
    assert PAIR.crowded and not MANY.crowded
    offsets, pointers = (multiply(x, w, None, "none", plan, asm) for plan in (PAIR, MANY))
    assert same_bits(offsets, pointers)
    torch.testing.assert_close(offsets, qmatmul_ref(x, w, None), rtol=2e-3, atol=0.1)


# bits, group, zero points of the weight, whether x has one; rows of x, shares, of them one after the other on an SM
EIGHT = {
    "whole": (8, 384, None, False, 19, 5, 1),
    "whole with a zero": (4, 384, 7.5, True, 3, 4, 2),
    "groups": (4, 128, "points", False, 1, 2, 1),
    "groups with a zero": (2, 128, None, True, 3, 4, 2),
    "groups of blocks": (4, 192, None, False, 1, 5, 1),
    "groups inside a block": (1, 32, None, True, 1, 4, 2),
    "zero points that are no halves": (4, 384, "points", True, 3, 4, 1),
}


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="the kernel runs interpreted or on a GPU")
@pytest.mark.parametrize("kind", EIGHT)
def test_shares_of_8_bit_products_sum_to_the_whole_and_integers_to_the_same_bits(kind):
    from gs_kernels.qmatmul.kernel import multiply_int8

    bits, group, zero, with_zero, m, shares, per_sm = EIGHT[kind]
    points = torch.linspace(0, 2**bits - 1.3, 40 * 384 // group).view(40, -1) if zero == "points" else zero
    w, (x, scale) = weight(n=40, k=384, bits=bits, group=group, zero=points), quantize_rows(normal(m, 384))
    scale, grid = (scale[:1], (scale[:1] * 0 + 3, code_sums(w))) if with_zero else (scale, None)
    bias, plan = normal(40), Plan(block_n=32, shares=shares, per_sm=per_sm)
    got = multiply_int8(x, scale, None, grid, w, bias, "relu", torch.float32, plan, not INTERPRET)
    wanted = qmatmul_int8_ref(x, scale, w, bias, x_zero=None if grid is None else grid[0], activation="relu")
    assert wanted.abs().max() > 1
    if group == 384 and zero != "points":
        assert same_bits(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="the kernel runs interpreted or on a GPU")
@pytest.mark.parametrize("group", [128, 384])
def test_shares_of_products_of_8_bit_floats_sum_to_the_whole(group):
    from gs_kernels.qmatmul.kernel import multiply_int8, quantize

    w, sums = weight(n=40, k=384, group=group), torch.empty(3, 3, device=DEVICE)
    x8, scale = quantize(normal(3, 384), torch.float8_e4m3fn, sums)
    got = multiply_int8(
        x8, scale, sums, None, w, None, "none", torch.float32, Plan(block_n=32, shares=5), not INTERPRET
    )
    wanted = (x8.float() * scale[:, None]) @ dequantize_packed(w, torch.float32).T
    assert wanted.abs().max() > 1
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0.02)


@pytest.mark.skipif(INTERPRET, reason="kernels cannot be compiled under TRITON_INTERPRET=1")
@pytest.mark.parametrize("target, early", [("sm_90", True), ("sm_80", False)])
def test_parts_are_added_by_a_kernel_that_starts_early_and_waits_before_it_reads(target, early):
    launches = launches_of(matmul(4, 16, shared=True), target)
    product, add = (launch.compiled.asm["ptx"] for launch in launches)
    assert [bool(launch.args.get("launch_pdl")) for launch in launches] == [False, early]
    assert ("griddepcontrol.launch_dependents" in product, "griddepcontrol.wait" in add) == (early, early)
    assert not early or add.index("griddepcontrol.wait") < add.index("ld.global")
    assert "griddepcontrol.wait" not in product and "atom" not in product
