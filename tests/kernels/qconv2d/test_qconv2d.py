"""Facts of packed convolutions that no comparison with a reference shows: the reference, edges, errors, plans."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import conv2d, pad
from torch.utils._python_dispatch import TorchDispatchMode

from gs_kernels import code_sums, dequantize_packed, pack_weight, qconv2d, qconv2d_int8, quantize, repack
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.qconv2d.cpu import int8
from gs_kernels.qconv2d.cpu.int8_plain import PlainSums
from gs_kernels.qconv2d.cpu.int8_weight import make_int8_weight
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.ref import qconv2d_int8_ref, qconv2d_ref
from gs_kernels.qconv2d.tiles import choose_plan, depthwise_tile
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms, same_bits


def weight(o=20, k=72, bits=4, group=None, zero=None, scale=None, layout="planar"):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (o, k), dtype=torch.uint8, generator=generator)
    if scale is None:
        scale = torch.rand(o, k // (group or k), generator=generator).add(0.5).div(2**bits * k**0.5)
    return pack_weight(codes, scale, zero, bits=bits, group_size=group, layout=layout).to(DEVICE)


def normal(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def eight_bits(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, sizes, dtype=torch.int8, generator=generator).to(DEVICE)


def number(value):
    return torch.full((1,), float(value), device=DEVICE)


def filters(w, r, s):
    return dequantize_packed(w).view(w.shape[0], r, s, -1).permute(0, 3, 1, 2)


GEOMETRIES = {
    "square": {"kernel_size": 3, "stride": 2, "padding": 1},
    "wide": {"kernel_size": (1, 5), "padding": (0, 2), "dilation": (1, 2)},
    "groups": {"kernel_size": (3, 2), "stride": (1, 2), "groups": 4},
    "one side longer": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "single channels": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 8},
    "49 taps": {"kernel_size": 7, "padding": 3},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_reference_is_the_float_convolution_of_the_real_weight_with_channels_fastest(name):
    about = GEOMETRIES[name]
    r, s = about["kernel_size"] if isinstance(about["kernel_size"], tuple) else (about["kernel_size"],) * 2
    w, x, bias = weight(k=r * s * 8 // about.get("groups", 1)), normal(2, 8, 9, 11), normal(20, seed=1)
    w = replace_rows(w, 16 if about.get("groups") else 20)
    rest = {k: v for k, v in about.items() if k != "kernel_size"}
    image = x
    if rest.get("padding") == "same":
        image, rest["padding"] = pad(x, (1, 2, 1, 2)), 0
    wanted = conv2d(image, filters(w, r, s), bias[: w.shape[0]], **rest)
    torch.testing.assert_close(qconv2d_ref(x, w, bias[: w.shape[0]], **about), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qconv2d(x, w, bias[: w.shape[0]], **about), wanted, rtol=1e-5, atol=1e-5)


def replace_rows(w, n):
    codes, scale = w.codes[:, :n].contiguous(), w.scale[:n]
    return replace(w, codes=codes, scale=scale, shape=(n, w.shape[1]))


@pytest.mark.parametrize(
    "bits, zero, group", [(8, None, None), (8, 3, 48), (4, None, 96), (2, 1.5, None), (1, None, 48)]
)
def test_sums_of_codes_are_those_of_64_bit_integers(bits, zero, group):
    """Scales of powers of two: nothing but the sums is rounded, and they are small enough to be whole."""
    w = weight(o=6, k=96, bits=bits, group=group, zero=zero, scale=torch.full((6, 96 // (group or 96)), 0.25))
    x = eight_bits(2, 24, 5, 6)
    steps = 2 * (dequantize_packed(w) * 4).double()
    codes = steps.long().view(6, 2, 2, 24)  # twice the code less its zero point
    wanted = torch.zeros(2, 6, 4, 4, dtype=torch.int64, device=DEVICE)
    padded = pad(x.long() - 5, (1, 0, 0, 0))
    for r in range(2):
        for s in range(2):
            wanted += torch.einsum("bcpq,oc->bopq", padded[:, :, r : r + 4, s + 1 : s + 5], codes[:, r, s])
    about = {"kernel_size": 2, "x_zero": number(5)}
    got = qconv2d_int8(x, number(8), w, **about)[:, :, :, : wanted.shape[3]]
    assert torch.equal(got[..., :4].double(), wanted.double())


@pytest.mark.parametrize("groups, kernel", [(1, 3), (8, 3), (2, 1)])
def test_beside_an_image_of_zero_points_is_zero_too(groups, kernel):
    w, bias = weight(o=16, k=kernel * kernel * 8 // groups, bits=8), normal(16)
    x = torch.full((1, 8, 4, 3), -77, dtype=torch.int8, device=DEVICE)
    about = {"kernel_size": kernel, "padding": 1, "groups": groups, "x_zero": number(-77)}
    y = qconv2d_int8(x, number(0.1), w, bias, **about)
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


def test_codes_of_a_result_are_those_of_quantize_and_feed_the_next_layer():
    """Codes 0..255 of what follows a ReLU, 128 lower: a second layer reads them with the same zero point."""
    first, second, x = weight(bits=8), weight(o=9, k=20, bits=4), eight_bits(2, 8, 6, 5)
    about = {"kernel_size": 3, "padding": 1, "activation": "relu", "x_zero": number(11)}
    real = qconv2d_int8(x, number(0.05), first, **about)
    scale, zero = real.max().view(1) / 255, number(-128)
    codes = qconv2d_int8(x, number(0.05), first, out_scale=scale, out_zero=zero, **about)
    assert torch.equal(codes, quantize(real, scale, zero, qmin=-128, qmax=127))
    y = qconv2d_int8(codes, scale, second, kernel_size=1, x_zero=zero)
    close = qconv2d((codes.float() + 128) * scale, second, kernel_size=1)
    torch.testing.assert_close(y, close, rtol=1e-4, atol=1e-4)
    assert relative_rms(y, qconv2d(real, second, kernel_size=1)) < 0.02


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_follows_bias_and_residual(activation):
    w, x, bias, residual = weight(), normal(2, 8, 5, 4), normal(20, seed=1), normal(2, 20, 5, 4, seed=2)
    about = {"kernel_size": 3, "padding": 1, "activation": activation, "residual": residual}
    torch.testing.assert_close(qconv2d(x, w, bias, **about), qconv2d_ref(x, w, bias, **about), rtol=1e-5, atol=1e-5)
    codes = eight_bits(2, 8, 5, 4)
    got, wanted = (f(codes, number(0.02), w, bias, **about) for f in (qconv2d_int8, qconv2d_int8_ref))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_reference_up_to_the_second(activation):
    w, bias, residual = weight(zero=7.5), normal(20, seed=1), normal(2, 20, 3, 2, seed=2)

    def gradients(run):
        x, b, r = normal(2, 8, 5, 4).requires_grad_(), bias.clone().requires_grad_(), residual.clone().requires_grad_()
        y = run(x, w, b, kernel_size=3, stride=2, padding=1, activation=activation, residual=r)
        first = torch.autograd.grad(y.square().sum(), (x, b, r), create_graph=True)
        return *first, torch.autograd.grad(first[0].square().sum(), x)[0]

    for found, wanted in zip(gradients(qconv2d), gradients(qconv2d_ref), strict=True):
        assert relative_rms(found, wanted) < 1e-5


def test_nothing_but_x_bias_and_residual_gets_a_gradient():
    w = weight()
    w = replace(w, scale=w.scale.requires_grad_())
    y = qconv2d(normal(1, 8, 5, 4).requires_grad_(), w, kernel_size=3)
    assert torch.autograd.grad(y.sum(), w.scale, allow_unused=True) == (None,)


def test_an_empty_batch_and_images_that_repeat():
    w, x = weight(), normal(1, 8, 5, 4)
    assert qconv2d(x[:0], w, kernel_size=3).shape == (0, 20, 3, 2)
    empty = qconv2d_int8(eight_bits(0, 8, 5, 4), number(1), w, kernel_size=3, out_scale=number(1))
    assert empty.shape == (0, 20, 3, 2) and empty.dtype == torch.int8
    y = qconv2d(x.expand(3, 8, 5, 4), w, kernel_size=3)
    torch.testing.assert_close(y, qconv2d(x, w, kernel_size=3).expand_as(y))


def test_a_canonical_weight_gives_what_a_planar_one_gives():
    w, x, codes = weight(bits=2), normal(2, 8, 5, 4), eight_bits(2, 8, 5, 4)
    other = repack(w, "canonical")
    torch.testing.assert_close(qconv2d(x, other, kernel_size=3), qconv2d(x, w, kernel_size=3), rtol=1e-5, atol=1e-5)
    both = (qconv2d_int8(codes, number(0.1), each, kernel_size=3) for each in (w, other))
    assert torch.equal(*both)


def test_sums_of_codes_may_be_made_beforehand():
    w, x = weight(bits=4, group=24, zero=torch.linspace(0, 15, 60).view(20, 3)), eight_bits(2, 8, 5, 4)
    about = {"kernel_size": 3, "padding": 1, "x_zero": number(-9)}
    given = qconv2d_int8(x, number(0.1), w, code_sums=code_sums(w), **about)
    assert torch.equal(given, qconv2d_int8(x, number(0.1), w, **about))


def test_the_old_name_of_code_sums_is_deprecated():
    w, x = weight(), eight_bits(1, 8, 5, 4)
    about = {"kernel_size": 3, "x_zero": number(-9)}
    with pytest.warns(DeprecationWarning, match="weight_sums is now code_sums"):
        old = qconv2d_int8(x, number(0.1), w, weight_sums=code_sums(w), **about)
    assert torch.equal(old, qconv2d_int8(x, number(0.1), w, code_sums=code_sums(w), **about))
    renamed = pytest.warns(DeprecationWarning, match="weight_sums is now code_sums")
    with renamed, pytest.raises(TypeError, match="got both; use code_sums"):
        qconv2d_int8(x, number(0.1), w, weight_sums=code_sums(w), code_sums=code_sums(w), **about)


def test_arguments_of_the_ops_keep_the_names_that_exported_files_hold():
    names = {argument.name for argument in torch.ops.gs_kernels.qconv2d_int8.default._schema.arguments}
    assert {"window", "weight_sums"} <= names


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRET, reason="only the CPU path keeps weights")
def test_kept_weights_give_the_same_bits_and_see_changes():
    w, x, codes = weight(zero=torch.linspace(7, 9, 20).view(20, 1)), normal(1, 8, 5, 4), eight_bits(1, 8, 5, 4)

    def both(keep):
        y = qconv2d(x, w, kernel_size=3, keep_dense=keep)
        return y, qconv2d_int8(codes, number(0.1), w, kernel_size=3, keep_dense=keep)

    for _ in range(2):
        assert all(same_bits(a, b) for a, b in zip(both(True), both(False), strict=True))
        assert same_bits(both(True)[0], both(True)[0])
        w.scale.mul_(2)
        w.zero.sub_(1)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRET, reason="the ways of the CPU path")
@pytest.mark.parametrize("channels, o, bits, about", [
    (16, 24, 8, {"padding": 1, "stride": 2}),
    (16, 24, 4, {"padding": 2, "dilation": 2}),
    (32, 32, 8, {"padding": 1, "groups": 32}),
    (24, 16, 8, {"padding": "same", "groups": 4}),
    (1024, 8, 8, {"padding": 1}),  # in parts: all at their largest, the sums are 2**28
], ids=["8 bit", "4 bit", "depthwise", "groups", "deep"])  # fmt: skip
def test_without_a_library_whole_numbers_in_fp32_give_the_same_bits(channels, o, bits, about, monkeypatch):
    monkeypatch.setattr(int8, "kernels", lambda: None)
    monkeypatch.setattr(int8, "derived", lambda weight, kind, build: build(weight))
    k = 9 * channels // about.get("groups", 1)
    w, x = weight(o=o, k=k, bits=bits), eight_bits(2, channels, 9, 7)
    if channels == 1024:
        w = pack_weight(torch.full((o, k), 255, dtype=torch.uint8), torch.full((o, 1), 1e-6), bits=8, group_size=k)
        x = torch.full_like(x, 127)
        assert len(PlainSums(make_int8_weight(w), ConvGeometry(3, 3), -128).parts[0]) > 1
    for zero in (None, number(-128), number(77)):
        options = {"kernel_size": 3, "x_zero": zero, **about}
        got, wanted = (f(x, number(0.02), w, normal(o), **options) for f in (qconv2d_int8, qconv2d_int8_ref))
        assert torch.equal(got, wanted)


GOOD = {"kernel_size": 3}
CALLS = {
    r"x must be \[B, C, H, W\], got \[8, 5, 4\]; add axes": lambda w, x: qconv2d(x[0], w, **GOOD),
    r"x must be float32 / float16 / bfloat16, got int64; cast x": lambda w, x: qconv2d(x.long(), w, **GOOD),
    r"qconv2d_int8: x must be int8, got float32": lambda w, x: qconv2d_int8(x, number(1), w, **GOOD),
    r"groups must divide the channels of x and y, got groups=3, C=8, O=20": lambda w, x: qconv2d(
        x, w, kernel_size=3, groups=3
    ),
    r"K of the weight \[20, 72\] must be .* = 2 \* 2 \* 8, got K=72; check kernel_size": lambda w, x: qconv2d(
        x, w, kernel_size=2
    ),
    r"must be .* = 3 \* 3 \* 7, got K=72": lambda w, x: qconv2d(x[:, :7], w, **GOOD),
    r"at least as large as the dilated kernel, got 5 x 4, .* dilation \(4, 4\)": lambda w, x: qconv2d(
        x, w, kernel_size=3, dilation=4
    ),
    r"padding must be an integer, a pair or 'same', got 'reflect'; pad x beforehand": lambda w, x: qconv2d(
        x, w, kernel_size=3, padding="reflect"
    ),
    r"padding 'same' needs stride 1, got \(2, 2\)": lambda w, x: qconv2d(x, w, kernel_size=3, padding="same", stride=2),
    r"stride must be at least 1, got 0": lambda w, x: qconv2d(x, w, kernel_size=3, stride=0),
    r"kernel_size must be an integer or a pair \(height, width\), got 3.0": lambda w, x: qconv2d(x, w, kernel_size=3.0),
    r"activation must be one of none, relu, relu6, .* got 'tanh'": lambda w, x: qconv2d(
        x, w, kernel_size=3, activation="tanh"
    ),
    r"bias must have shape \[20\], got \[3\]": lambda w, x: qconv2d(x, w, normal(3), **GOOD),
    r"residual must have shape \[2, 20, 3, 2\], got \[2, 20, 5, 4\]": lambda w, x: qconv2d(
        x, w, residual=normal(2, 20, 5, 4), **GOOD
    ),
    r"x_scale must have shape \[1\], got \[2\]": lambda w, x: qconv2d_int8(x.to(torch.int8), normal(2), w, **GOOD),
    r"code_sums must have shape \[20, 1\], got \[20\]": lambda w, x: qconv2d_int8(
        x.to(torch.int8), number(1), w, code_sums=torch.ones(20, dtype=torch.int32, device=DEVICE), **GOOD
    ),
    r"an int8 residual and residual_scale must be given together": lambda w, x: qconv2d_int8(
        x.to(torch.int8), number(1), w, residual=eight_bits(2, 20, 3, 2), **GOOD
    ),
    r"out_zero needs out_scale, got None": lambda w, x: qconv2d_int8(
        x.to(torch.int8), number(1), w, out_zero=number(0), **GOOD
    ),
    r"dtype must be float32 / float16 / bfloat16, got torch.int8; out_scale gives int8": lambda w, x: qconv2d_int8(
        x.to(torch.int8), number(1), w, dtype=torch.int8, **GOOD
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_wrong_calls_say_what_must_hold(words):
    with pytest.raises((TypeError, ValueError), match=words):
        CALLS[words](weight(), normal(2, 8, 5, 4))


def test_8_bit_images_refuse_what_is_not_exact():
    codes = torch.zeros(3, 16, dtype=torch.uint8)
    table = pack_weight(codes, torch.ones(3, 1), bits=4, levels=torch.linspace(-1, 1, 16), layout="planar").to(DEVICE)
    with pytest.raises(ValueError, match=r"qconv2d_int8: .* evenly spaced grid, got levels; use qconv2d"):
        qconv2d_int8(eight_bits(1, 16, 1, 1), number(1), table, kernel_size=1)
    large = weight(o=1, k=1 << 15)
    with pytest.raises(ValueError, match="group_size must be at most 16384, got 32768; use groups"):
        qconv2d_int8(eight_bits(1, 1 << 15, 1, 1), number(1), large, kernel_size=1)


ON_H100 = {"channels": 64, "x_bits": 16, "levels": False, "sm": 90, "sm_count": 132}


def test_the_largest_tile_that_fills_the_processors_is_taken():
    assert choose_plan(32 * 56 * 56, 64, 576, 1, **ON_H100) == Plan(block_m=128, block_n=64, warps=4, stages=3)
    assert choose_plan(32 * 14 * 14, 1024, 256, 1, **ON_H100) == Plan(block_m=128, warps=8, stages=3)
    late = choose_plan(49, 512, 4608, 1, **ON_H100)
    assert late.block_m == 32 and late.split_k == 8  # 8 tiles, and 36 blocks of products
    assert choose_plan(49, 512, 4608, 1, **ON_H100, splits=False).split_k == 1
    assert choose_plan(1, 1000, 512, 1, **ON_H100).scale_parts
    assert choose_plan(32 * 56 * 56, 64, 576, 1, **(ON_H100 | {"sm": 80})).block_m == 64


def test_what_takes_many_registers_takes_few_pixels():
    assert choose_plan(256, 64, 147, 1, **(ON_H100 | {"channels": 3})).block_m == 32
    assert choose_plan(32 * 112 * 112, 64, 147, 1, **(ON_H100 | {"channels": 3})).dense
    assert choose_plan(32 * 112 * 112, 64, 147, 1, **(ON_H100 | {"channels": 3, "x_bits": 8})).block_m == 32
    assert choose_plan(32 * 28 * 28, 128, 1152, 1, **(ON_H100 | {"x_bits": 8}), int8_group=32).block_m == 32
    assert choose_plan(1000, 128, 1152, 1, **(ON_H100 | {"x_bits": 32})).dense
    assert choose_plan(1000, 128, 1152, 1, **(ON_H100 | {"levels": True})).dense
    assert depthwise_tile(3)[:2] == (128, 16) and depthwise_tile(960)[:2] == (32, 64)


class Made(TorchDispatchMode):
    """The shapes of the tensors that are made inside."""

    def __enter__(self):
        self.shapes = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(result.shape)] if isinstance(result, torch.Tensor) else []
        return result


@pytest.mark.parametrize("size", [7, 64])
def test_a_picture_with_channels_first_is_read_as_it_lies(size):
    w = weight(o=16, k=27, layout="canonical" if DEVICE.type == "cpu" and not INTERPRET else "planar")
    x, codes = normal(2, 3, size, 6), eight_bits(2, 3, size, 6)
    about = {"kernel_size": 3, "padding": 1}
    calls = (
        (x, lambda image: qconv2d(image, w, **about)),
        (codes, lambda image: qconv2d_int8(image, number(0.1), w, x_zero=number(7), **about)),
    )
    for image, call in calls:
        last = image.contiguous(memory_format=torch.channels_last)
        wanted = call(last)
        with Made() as made:
            got = call(image)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_rms(got, wanted) < 1e-6
        copies = made.shapes.count(tuple(image.shape))
        assert copies <= (0 if DEVICE.type == "cuda" or INTERPRET else 2)  # for oneDNN: with channels last, unsigned


interpreted = pytest.mark.skipif(not INTERPRET, reason="only TRITON_INTERPRET=1 runs kernels on numpy")


def both_forms(run, y):
    """What a launcher writes without and with inline assembly."""
    results = []
    for asm in (False, True):
        out = torch.empty_like(y)
        run(out, asm)
        results.append(out)
    return results


@interpreted
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_8_bit_kernels_with_assembly_give_the_bits_of_plain_ones(bits, emulated_assembly):
    from gs_kernels.qconv2d.kernel import convolve_int8

    x, requant = eight_bits(1, 16, 4, 4).contiguous(memory_format=torch.channels_last), (None,) * 5
    geometry, y = ConvGeometry(3, 3, top=1, bottom=1, left=1, right=1), torch.empty(1, 33, 4, 4)
    y = y.contiguous(memory_format=torch.channels_last)
    for zero in (None, torch.linspace(0, 2**bits - 1, 33).view(33, 1)):
        w = weight(o=33, k=144, bits=bits, zero=zero)
        head, tail = (x, number(0.1), number(7), code_sums(w), w, None, requant), (geometry, "none", Plan())

        def run(out, asm, head=head, tail=tail):
            convolve_int8(out, *head, *tail, asm)

        plain, asm = both_forms(run, y)
        assert same_bits(plain, asm)
        assert same_bits(plain, qconv2d_int8_ref(x, number(0.1), w, kernel_size=3, padding=1, x_zero=number(7)))


@interpreted
@pytest.mark.parametrize("split", [1, 3])
def test_parts_of_k_sum_to_the_whole(split):
    from gs_kernels.qconv2d.kernel import convolve, convolve_int8

    w, geometry = weight(o=20, k=576, bits=2, zero=1.5), ConvGeometry(3, 3)
    plan, rest = Plan(block_m=16, block_n=64, split_k=split), (geometry, "relu")
    y, residual = torch.empty(1, 20, 2, 2), normal(1, 20, 2, 2, seed=4)
    y, about = y.contiguous(memory_format=torch.channels_last), {"kernel_size": 3, "activation": "relu"}
    x, codes = normal(1, 64, 4, 4), eight_bits(1, 64, 4, 4)
    convolve(y, x, w, None, residual, *rest, plan, False)
    torch.testing.assert_close(y, qconv2d_ref(x, w, residual=residual, **about), rtol=1e-5, atol=1e-4)
    requant = (residual, None, None, None, None)
    convolve_int8(y, codes, number(0.1), number(3), code_sums(w), w, None, requant, *rest, plan, False)
    wanted = qconv2d_int8_ref(codes, number(0.1), w, residual=residual, x_zero=number(3), **about)
    assert torch.equal(y, wanted)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRET, reason="a GPU does not look at values")
@pytest.mark.parametrize("zero", [0.5, 128.0, float("nan")])
def test_a_zero_point_that_is_no_code_is_refused(zero):
    w = pack_weight(torch.ones(2, 9, dtype=torch.uint8), torch.ones(2, 1), bits=4, group_size=9)
    x = torch.ones(1, 1, 4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="x_zero must be a whole number from -128 to 127"):
        qconv2d_int8(x, torch.ones(1), w, kernel_size=3, padding=1, x_zero=torch.tensor([zero]))
