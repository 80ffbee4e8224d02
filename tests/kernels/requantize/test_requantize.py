"""Facts of requantizing that no comparison with the reference shows: rounding, every way on a CPU, errors, tracing."""

import pytest
import torch

from gs_kernels import dequantize, fake_quant, quantize, requantize
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.requantize import cpu
from gs_kernels.requantize.ref import requantize_ref
from gs_kernels.requantize.spec import make, shape
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE


def one(value):
    return torch.tensor([float(value)], device=DEVICE)


def codes(*values):
    return torch.tensor(values, dtype=torch.int8, device=DEVICE)


def drawn(s, dtype=torch.float32):
    case = make(s, dtype, DEVICE, torch.Generator(device=DEVICE).manual_seed(1))
    return case.args, case.kwargs


def test_sums_are_rounded_half_to_even_and_stay_on_the_grid():
    a, b = codes(1, 3, 5, 127, -128), codes(0, 0, 0, 127, -128)
    got = requantize(a, one(1), one(0), b, one(1), one(0), out_scale=one(2), out_zero=one(1), qmin=-100, qmax=100)
    assert got.tolist() == [1, 3, 3, 100, -100]


def test_codes_of_a_sum_are_those_of_the_floats_of_a_network():
    (a, sa, za, b, sb, zb), kwargs = drawn(shape((3, 5, 7), activation="relu"))
    floats = torch.relu(dequantize(a, sa, za) + dequantize(b, sb, zb))
    grid = {"qmin": -128, "qmax": 127}
    want = quantize(floats, kwargs["out_scale"], kwargs["out_zero"], **grid)
    assert torch.equal(requantize(a, sa, za, b, sb, zb, **kwargs), want)
    back = dequantize(want, kwargs["out_scale"], kwargs["out_zero"])
    assert torch.equal(back, fake_quant(floats, kwargs["out_scale"], kwargs["out_zero"], **grid))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_activation_is_applied(name, dtype):
    args, kwargs = drawn(shape((3, 129), activation=name, out=False), dtype)
    torch.testing.assert_close(requantize(*args, **kwargs), requantize_ref(*args, **kwargs), rtol=2e-3, atol=1e-6)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
@pytest.mark.parametrize("activation", ["relu6", "hardswish", "silu"])  # one pass of C++, three
@pytest.mark.parametrize("b", [True, False])
def test_operations_give_the_bits_of_the_code_in_cpp(b, activation, monkeypatch):
    args, kwargs = drawn(shape((2, 16, 9, 9), b=b, activation=activation))
    image = args[0].contiguous(memory_format=torch.channels_last)
    want = requantize(image, *args[1:], **kwargs)
    monkeypatch.setattr(cpu, "sum_codes_of", lambda *_: None)
    got = requantize(image, *args[1:], **kwargs)
    assert torch.equal(got, want) and got.stride() == want.stride() == image.stride()


ARGS = {"a": codes(1, 2), "a_scale": one(1), "a_zero": one(0)}
OTHER = {"b": codes(1, 2), "b_scale": one(1), "b_zero": one(0)}


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"a": torch.ones(2, device=DEVICE)}, TypeError, "a: x must be one of int8, got float32"),
        ({"a_scale": one(0)}, ValueError, "a: every scale must be > 0"),
        ({"a_zero": torch.zeros(2, device=DEVICE)}, ValueError, r"a: zero must have shape \[1\]"),
        ({**OTHER, "b": codes(1)}, ValueError, r"b must have the shape and device of a, \(2,\) on .*, got \(1,\)"),
        ({"b": codes(1, 2)}, TypeError, "b_scale and b_zero must both be tensors, got None"),
        ({"b_scale": one(1)}, ValueError, "b_scale and b_zero must come with b"),
        ({"out_scale": one(1)}, TypeError, "out_scale and out_zero must both be tensors"),
        ({"qmin": 0, "qmax": 255}, ValueError, "-128 <= qmin < qmax <= 127 must hold, got qmin=0, qmax=255"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, .*, got 'tanh'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of float32, float16, bfloat16, got int8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, error, words):
    if "a_scale" in changes and DEVICE.type != "cpu":
        pytest.skip("values are read on a CPU only")
    with pytest.raises(error, match=words):
        requantize(**{**ARGS, **changes})


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck_and_one_compiled_graph():
    args, kwargs = drawn(shape((2, 3, 6, 6), activation="relu"))
    out = (kwargs["out_scale"], kwargs["out_zero"], -128, 127, "")
    torch.library.opcheck(torch.ops.gs_kernels.requantize.default, (*args, "relu", torch.float32, *out))
    turned = (args[0].transpose(1, 3), *args[1:3], None, None, None)
    torch.library.opcheck(
        torch.ops.gs_kernels.requantize.default, (*turned, "silu", torch.bfloat16, None, None, -128, 127, "")
    )
    compiled = torch.compile(lambda *t: requantize(*t, **kwargs) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), requantize(*args, **kwargs) + 1)
