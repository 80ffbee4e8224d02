"""Facts about fake-quant beyond the reference: torch's own ops as a second oracle, the edges of the grid, errors."""

import itertools
import math

import pytest
import torch

from gs_kernels import PerChannel, PerGroup, PerTensor, dequantize, fake_quant, quantize
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms, same_bits

NAN, INF = float("nan"), float("inf")


def qparams(scale, zero, device, learned=False):
    scale, zero = (torch.tensor(v, dtype=torch.float32, device=device) for v in (scale, zero))
    return scale.requires_grad_(learned), zero.requires_grad_(learned)


def test_ties_round_to_even(device):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], device=device)
    y = fake_quant(x, *qparams([1.0], [0.0], device), qmin=-8, qmax=7)
    assert y.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, -2.0]]


def test_ties_stay_even_around_a_zero_point(device):
    x = torch.tensor([0.5, 1.5, -0.5], device=device)
    assert quantize(x, *qparams([1.0], [3.0], device), qmin=0, qmax=7).tolist() == [3, 5, 3]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)])
@pytest.mark.parametrize("qmin, qmax", [(-8, 7), (0, 255), (-127, 127), (0, 1)])
def test_integer_zero_points_give_the_bits_of_torch(granularity, qmin, qmax, device, generator):
    x = torch.randn(4, 6, 33, generator=generator, device=device).requires_grad_()
    n = 6 if isinstance(granularity, PerChannel) else 1
    scale = torch.rand(n, generator=generator, device=device) * 4 / (qmax - qmin) + 1e-3
    zero = torch.randint(qmin, qmax + 1, (n,), generator=generator, device=device)
    if n == 1:
        want = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), qmin, qmax)
    else:
        want = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 1, qmin, qmax)
    got = fake_quant(x, scale, zero.float(), qmin=qmin, qmax=qmax, granularity=granularity)
    dy = torch.randn(x.shape, generator=generator, device=device)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(want, x, dy)[0])


def test_learned_step_gradients_agree_with_torch(device, generator):
    x = torch.randn(5, 300, generator=generator, device=device).requires_grad_()
    scale = (torch.rand(5, generator=generator, device=device) * 0.3 + 0.05).requires_grad_()
    zero = torch.tensor([0.0, 3.0, -2.0, 7.0, -8.0], device=device).requires_grad_()
    dy = torch.randn(x.shape, generator=generator, device=device)
    want = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 0, -8, 7, 1.0)
    got = fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0))
    wanted = torch.autograd.grad(want, (x, scale, zero), dy)
    for grad, expected in zip(torch.autograd.grad(got, (x, scale, zero), dy), wanted, strict=True):
        assert relative_rms(grad, expected) < 1e-5


def test_gradients_of_one_element_are_those_of_the_formula(device):
    """x / s = 0.75, 1.25 and beyond both ends of -2..1, with s = 0.5."""
    x = torch.tensor([[0.375], [0.625], [-9.0], [9.0]], device=device)
    scale, zero = qparams([0.5] * 4, [0.0] * 4, device, learned=True)
    y = fake_quant(x.requires_grad_(), scale, zero, qmin=-2, qmax=1, granularity=PerChannel(0))
    y.backward(torch.full_like(y, 10.0))
    assert x.grad.flatten().tolist() == [10.0, 10.0, 0.0, 0.0]
    assert scale.grad.tolist() == [2.5, -2.5, -20.0, 10.0]
    assert zero.grad.tolist() == [0.0, 0.0, -5.0, -5.0]


def test_the_last_level_is_inside_and_the_next_is_outside(device):
    x = torch.tensor([7.0, 7.5, 7.49, -8.0, -8.5, -8.51], device=device, requires_grad=True)
    fake_quant(x, *qparams([1.0], [0.0], device), qmin=-8, qmax=7).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def test_one_bit_gives_plus_and_minus_half_a_scale(device):
    x = torch.tensor([-3.0, -0.01, 0.01, 0.4, 5.0], device=device)
    y = fake_quant(x, *qparams([2.0], [-0.5], device), qmin=-1, qmax=0)
    assert y.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_stays_nan_and_infinity_takes_the_end_of_the_grid(dtype, device):
    x = torch.tensor([NAN, INF, -INF, 6e4, -6e4, 1.0], dtype=dtype, device=device, requires_grad=True)
    y = fake_quant(x, *qparams([0.5], [1.0], device), qmin=-8, qmax=7)
    assert y[0].isnan() and y[1:].tolist() == [3.0, -4.5, 3.0, -4.5, 1.0]
    y.backward(torch.full_like(y, INF))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, INF]


def test_values_beyond_every_integer_clamp(device):
    x = torch.tensor([3e38, -3e38, 1e9, -1e9], device=device)
    assert fake_quant(x, *qparams([1e-3], [0.0], device), qmin=-1, qmax=1).tolist() == pytest.approx(
        [1e-3, -1e-3, 1e-3, -1e-3]
    )


@pytest.mark.parametrize("granularity, n", [(PerTensor(), 1), (PerChannel(-1), 24), (PerGroup(8), 12)])
def test_codes_stand_for_the_values_of_fake_quant(granularity, n, device, generator):
    x = torch.randn(4, 24, generator=generator, device=device)
    scale = torch.rand(n, generator=generator, device=device) * 0.2 + 0.05
    zero = torch.rand(n, generator=generator, device=device) * 15 - 8
    kwargs = {"qmin": -8, "qmax": 7, "granularity": granularity}
    codes = quantize(x, scale, zero, **kwargs)
    assert codes.dtype == torch.int8 and codes.min() == -8 and codes.max() == 7
    assert torch.equal(dequantize(codes, scale, zero, granularity=granularity), fake_quant(x, scale, zero, **kwargs))


def test_nan_becomes_the_lowest_code(device):
    codes = quantize(torch.tensor([NAN, 1.0], device=device), *qparams([1.0], [0.0], device), qmin=0, qmax=255)
    assert codes.dtype == torch.uint8 and codes.tolist() == [0, 1]


@pytest.mark.parametrize("learned", [False, True])
def test_backward_keeps_x_and_next_to_nothing_else(learned, device, generator):
    x = torch.randn(64, 1024, generator=generator, device=device).requires_grad_()
    scale, zero = qparams([0.1] * 64, [0.0] * 64, device, learned)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0))
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert others.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(others.values()) <= 0.05 * x.nbytes


def test_scale_and_zero_get_gradients_only_when_they_ask(device):
    x = torch.ones(2, device=device, requires_grad=True)
    scale, zero = qparams([0.5], [0.0], device)
    scale.requires_grad_()
    fake_quant(x, scale, zero, qmin=-8, qmax=7).sum().backward()
    assert x.grad is not None and scale.grad is not None and zero.grad is None


def test_a_second_derivative_is_refused(device):
    x = torch.ones(2, device=device, requires_grad=True)
    y = fake_quant(x, *qparams([0.5], [0.0], device), qmin=-8, qmax=7)
    (dx,) = torch.autograd.grad((y * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of its own; call backward without create_graph"):
        dx.sum().backward()


def test_groups_that_cross_the_memory_order_keep_the_strides_of_x(device, generator):
    x = torch.randn(4, 8, 2, 2, generator=generator, device=device).to(memory_format=torch.channels_last)
    scale, zero = qparams([0.1] * 16, [0.0] * 16, device)
    y = fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=PerGroup(8))
    assert y.stride() == x.stride()
    assert torch.equal(y, fake_quant(x.contiguous(), scale, zero, qmin=-8, qmax=7, granularity=PerGroup(8)))


def test_a_broadcast_gradient_is_accepted(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    fake_quant(x, *qparams([10.0], [0.0], device), qmin=-8, qmax=7).sum().backward()
    assert x.grad.tolist() == [[1.0] * 4] * 3


X = torch.ones(4, 6)
ONE, ZERO = torch.ones(1), torch.zeros(1)
WRONG_VALUES = {
    "no element": (
        (torch.ones(0, 4), ONE, ZERO),
        {},
        r"fake_quant: x must hold at least one element, got shape \(0, 4\)",
    ),
    "scale of another shape": ((X, torch.ones(3), ZERO), {}, r"scale must have shape \[1\] for x .* got \[3\]"),
    "zero of another shape": ((X, ONE, torch.zeros(1, 1)), {}, r"zero must have shape \[1\]"),
    "one scale too many": (
        (X, torch.ones(6), torch.zeros(6)),
        {"granularity": PerChannel(0)},
        r"scale must have shape \[4\]",
    ),
    "axis out of range": ((X, ONE, ZERO), {"granularity": PerChannel(2)}, r"axis must be in \[-2, 2\).*got axis=2"),
    "group that does not divide": (
        (X, ONE, ZERO),
        {"granularity": PerGroup(4)},
        r"must divide the 6 elements of a row .* got size=4; use PerGroup\(2\)",
    ),
    "empty grid": ((X, ONE, ZERO), {"qmin": 7, "qmax": 7}, "qmin must be below qmax, got qmin=7, qmax=7"),
    "scale 0": ((X, ZERO, ZERO), {}, "every scale must be > 0 .* and finite, got 0 to 0"),
    "negative scale": ((X, -ONE, ZERO), {}, "every scale must be > 0"),
    "NaN scale": ((X, ONE * NAN, ZERO), {}, "every scale must be > 0 .* finite, got nan"),
    "infinite scale": ((X, ONE * INF, ZERO), {}, "every scale must be > 0"),
    "NaN zero": ((X, ONE, ZERO * NAN), {}, "every zero point must be finite"),
    "huge zero": ((X, ONE, ONE * 1e9), {}, r"every zero point must be finite and within ±2\*\*20, got 1e\+09"),
    "other device": ((X, ONE.to("meta"), ZERO), {}, "scale must be on the device of x, cpu, got meta; use scale.to"),
}
WRONG_TYPES = {
    "integer x": ((X.long(), ONE, ZERO), {}, "x must be one of float32, float16, bfloat16, got int64; cast x first"),
    "double x": ((X.double(), ONE, ZERO), {}, "got float64"),
    "not a tensor": (([1.0], ONE, ZERO), {}, "x must be a tensor, got list"),
    "scale a number": ((X, 0.5, ZERO), {}, r"scale must be a tensor, got float; use torch.tensor"),
    "half scale": ((X, ONE.half(), ZERO), {}, r"scale must be float32, got float16; use scale.float\(\)"),
    "integer zero": ((X, ONE, ZERO.int()), {}, r"zero must be float32, got int32; use zero.float\(\)"),
    "axis for granularity": (
        (X, ONE, ZERO),
        {"granularity": 0},
        "granularity must be PerTensor, PerChannel or PerGroup",
    ),
}


@pytest.mark.parametrize("op", [fake_quant, quantize])
@pytest.mark.parametrize("args, kwargs, words", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_named(op, args, kwargs, words):
    with pytest.raises(ValueError, match=words.replace("fake_quant:", f"{op.__name__}:")):
        op(*args, **({"qmin": -8, "qmax": 7} | kwargs))


@pytest.mark.parametrize("args, kwargs, words", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types_are_named(args, kwargs, words):
    with pytest.raises(TypeError, match=words):
        fake_quant(*args, **({"qmin": -8, "qmax": 7} | kwargs))


@pytest.mark.parametrize("qmin, qmax, words", [(-129, 127, "int8, -128..127"), (0, 256, "uint8, 0..255")])
def test_levels_beyond_a_byte_are_refused_by_quantize(qmin, qmax, words):
    with pytest.raises(ValueError, match=f"levels must fit {words}, got qmin={qmin}, qmax={qmax}"):
        quantize(X, ONE, ZERO, qmin=qmin, qmax=qmax)


def test_a_bad_scale_off_the_cpu_makes_its_channel_nan(device):
    """Where looking at the values would stall a GPU or stop a trace: the raw op does not look."""
    scale = torch.tensor([0.0, 1.0, -1.0, INF, NAN, 1.0], device=device)
    zero = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1e9], device=device)
    x = torch.ones(6, 3, device=device)
    y = torch.ops.gs_kernels.fake_quant(x, scale, zero, -8, 7, 0, 0, "")
    assert y.isnan().all(1).tolist() == [True, False, True, True, True, True]
    assert y[1].tolist() == [1.0, 1.0, 1.0]


def test_equal_inputs_give_equal_bits_whatever_else_is_in_the_tensor(device, generator):
    """A row's result does not depend on its neighbours, nor on how rows fall into tiles."""
    x = torch.randn(37, 515, generator=generator, device=device)
    scale = torch.rand(37, generator=generator, device=device) + 0.05
    zero = torch.zeros(37, device=device)
    whole = fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0))
    row = fake_quant(x[20:21], scale[20:21], zero[20:21], qmin=-8, qmax=7, granularity=PerChannel(0))
    assert same_bits(whole[20:21], row)


def test_more_levels_bring_x_closer(device, generator):
    x = torch.rand(1000, generator=generator, device=device) * 2 - 1
    errors = []
    for bits in range(1, 9):
        levels = 2**bits - 1
        zero = -0.5 if bits == 1 else 0.0
        scale = torch.tensor([2.0 / levels], device=device)
        y = fake_quant(x, scale, torch.tensor([zero], device=device), qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1)
        errors.append((y - x).square().mean().item())
    assert all(b < a / 2 for a, b in itertools.pairwise(errors))
    assert math.isclose(errors[-1], (2 / 255) ** 2 / 12, rel_tol=0.2)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: its bf16 casts truncate")
def test_bf16_is_rounded_once_at_the_store(device):
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, device=device)
    scale = torch.tensor([1.00390625], device=device)  # halfway between two bf16 numbers
    y = fake_quant(x, scale, torch.zeros(1, device=device), qmin=-8, qmax=7)
    assert y.tolist() == (torch.tensor([1.0, 3.0]) * 1.00390625).bfloat16().tolist()
