"""Facts of L1 products of codes beyond the reference: worked values, grids, extremes, errors, tracing."""

from __future__ import annotations

import pytest
import torch

from gs_kernels import adder_conv2d, adder_int8, quantize
from gs_kernels.runtime.dispatch import INTERPRET

traced = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
OPS = torch.ops.gs_kernels


def codes(generator, device, *shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator, device=device)


def test_two_pixels_by_hand(device):
    x = torch.tensor([[[[100, -128]]]], dtype=torch.int8, device=device)
    w = torch.tensor([[[[-100, 127]]]], dtype=torch.int8, device=device)
    zero = torch.tensor([-3.0], device=device)
    y = adder_int8(x, w, padding=(0, 1), zero=zero)
    assert y.dtype == torch.int32 and y.tolist() == [[[[-(97 + 27), -(200 + 255), -(28 + 130)]]]]


@pytest.mark.parametrize("k", [1, 7, 8, 9, 70])
def test_the_farthest_codes_add_up(k, device):
    x = torch.full((1, k, 1, 20), -128, dtype=torch.int8, device=device)
    assert (adder_int8(x, torch.full((3, k, 1, 1), 127, dtype=torch.int8, device=device)) == -255 * k).all()


def test_scaled_sums_are_the_float_product_of_what_codes_stand_for(generator, device):
    x, w = codes(generator, device, 2, 9, 7, 5), codes(generator, device, 6, 9, 3, 3)
    step, zero = 0.0625, 5
    scale, gain = torch.full((1,), step, device=device), torch.rand(6, generator=generator, device=device)
    bias = torch.randn(6, generator=generator, device=device)
    want = adder_conv2d((x.float() - zero) * step, (w.float() - zero) * step, 2, 1) * gain.view(-1, 1, 1)
    want = (want + bias.view(-1, 1, 1)).relu()
    zeros = torch.full((1,), float(zero), device=device)
    y = adder_int8(x, w, scale * gain, bias, stride=2, padding=1, zero=zeros, activation="relu")
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    out = torch.full((1,), 0.5, device=device)
    got = adder_int8(x, w, scale * gain, bias, stride=2, padding=1, zero=zeros, out_scale=out)
    plain = adder_int8(x, w, scale * gain, bias, stride=2, padding=1, zero=zeros)
    assert torch.equal(got, quantize(plain, out, torch.zeros_like(out), qmin=-128, qmax=127))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_no_images(device):
    x = torch.ones(0, 3, 4, 4, dtype=torch.int8, device=device)
    assert adder_int8(x, torch.ones(5, 3, 1, 1, dtype=torch.int8, device=device)).shape == (0, 5, 4, 4)


X, W = torch.ones(2, 3, 5, 5, dtype=torch.int8), torch.ones(4, 3, 3, 3, dtype=torch.int8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    "error, words, arguments, options",
    [
        (TypeError, "x must be int8, got float32", (X.float(), W), {}),
        (TypeError, "weight must be int8, got uint8", (X, W.byte()), {}),
        (ValueError, r"scale must have shape \[4\], got \[3\]", (X, W, torch.ones(3)), {}),
        (
            ValueError,
            "bias, activation must come with scale, got None",
            (X, W, None, torch.ones(4)),
            {"activation": "relu"},
        ),
        (ValueError, "activation must be one of none, relu", (X, W, ONE), {"activation": "tanh"}),
        (TypeError, "dtype must be float32 / float16 / bfloat16, got torch.int8", (X, W, ONE), {"dtype": torch.int8}),
        (ValueError, "an int8 residual and residual_scale", (X, W, ONE), {"residual": torch.ones(2, 4, 3, 3).char()}),
        (ValueError, "out_zero needs out_scale, got None", (X, W, ONE), {"out_zero": ONE}),
        (ValueError, r"zero must have shape \[1\], got \[2\]", (X, W), {"zero": torch.ones(2)}),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments, options):
    with pytest.raises(error, match=words):
        adder_int8(*arguments, **options)


@traced
def test_opcheck(generator):
    x, w = codes(generator, "cpu", 2, 3, 5, 4), codes(generator, "cpu", 4, 3, 3, 3)
    window = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    nothing = (None,) * 3
    for out in (None, ONE):
        args = (x, w, ONE, torch.ones(4), window, ONE, *nothing, out, None, "relu", torch.float32, "")
        torch.library.opcheck(OPS.adder_int8.default, args)
