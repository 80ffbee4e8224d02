"""Facts of L1 products beyond the reference: worked values, fp64, gradients by hand, shapes, errors, tracing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import unfold

from gs_kernels import adder_conv2d, adder_linear
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms

traced = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
OPS = torch.ops.gs_kernels


def draw(generator, device, *shapes):
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def exact(x, w, dy, stride=1, padding=0, dilation=1):
    """The result and both gradients, in fp64, from their formulas."""
    x, w, dy = x.double(), w.double(), dy.double()
    patches = unfold(x, w.shape[2:], dilation, padding, stride)[:, None].requires_grad_()
    d = patches.detach() - w.flatten(1)[:, :, None]  # [B, O, K, L]
    y = -d.abs().sum(2).view(dy.shape)
    g = dy.flatten(2)[:, :, None]
    dw = (d * g).sum((0, 3)).view(w.shape)
    image = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(
        unfold(image, w.shape[2:], dilation, padding, stride), image, ((-d).clamp(-1, 1) * g).sum(1)
    )
    return y, dx, dw


def test_two_pixels_by_hand(device):
    x = torch.tensor([[[[1.0, -2.0]]]], device=device, requires_grad=True)
    w = torch.tensor([[[[0.5, 0.25]]]], device=device, requires_grad=True)
    y = adder_conv2d(x, w, padding=(0, 1))
    assert y.tolist() == [[[[-(0.5 + 0.75), -(0.5 + 2.25), -(2.5 + 0.25)]]]]
    y.backward(torch.tensor([[[[2.0, 3.0, 5.0]]]], device=device))
    # x[0] meets w[1] in y[0] and w[0] in y[1]; x[1] meets w[1] in y[1] and w[0] in y[2]
    assert x.grad.tolist() == [[[[2 * -0.75 + 3 * -0.5, 3 * 1.0 + 5 * 1.0]]]]
    assert w.grad.tolist() == [[[[2 * -0.5 + 3 * 0.5 + 5 * -2.5, 2 * 0.75 + 3 * -2.25 + 5 * -0.25]]]]


@pytest.mark.parametrize(
    "x, w, geometry",
    [
        ((2, 16, 6, 7), (9, 16, 3, 3), {"padding": 1}),
        ((1, 3, 9, 11), (5, 3, 3, 3), {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2)}),
        ((2, 70, 5, 5), (17, 70, 1, 1), {"stride": 2}),
    ],
)
def test_value_and_gradients_are_those_of_fp64(x, w, geometry, generator, device):
    x, w = draw(generator, device, x, w)
    y = adder_conv2d(x.requires_grad_(), w.requires_grad_(), **geometry)
    (dy,) = draw(generator, device, y.shape)
    y.backward(dy)
    for got, want in zip((y, x.grad, w.grad), exact(x.detach(), w.detach(), dy, **geometry), strict=True):
        assert relative_rms(got.detach(), want) < 5e-7


def test_padding_on_one_side_only(generator, device):
    x, w = draw(generator, device, (1, 4, 6, 5), (5, 4, 2, 4))
    y = adder_conv2d(x.requires_grad_(), w.requires_grad_(), padding="same")
    around = torch.nn.functional.pad(x, (1, 2, 0, 1))
    want = adder_conv2d(around, w)
    assert torch.equal(y, want)
    for got, wanted in zip(*(torch.autograd.grad(t.square().sum(), (x, w)) for t in (y, want)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_linear_layer_is_a_convolution_of_single_pixels(generator, device):
    x, w = draw(generator, device, (2, 3, 19), (11, 19))
    y = adder_linear(x.requires_grad_(), w.requires_grad_())
    pixels = x.reshape(6, 19, 1, 1)
    want = adder_conv2d(pixels, w[:, :, None, None])
    assert y.is_contiguous() and y.shape == (2, 3, 11)
    torch.testing.assert_close(y.view(6, 11), want[:, :, 0, 0], rtol=2e-6, atol=0)
    dy = torch.randn(6, 11, generator=generator, device=device)
    grads = [torch.autograd.grad(t, (x, w), dy.view(t.shape)) for t in (y, want)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-5)


def test_no_images_and_no_rows(device):
    w = torch.ones(5, 3, 2, 2, device=device, requires_grad=True)
    x = torch.ones(0, 3, 4, 4, device=device, requires_grad=True)
    y = adder_conv2d(x, w)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 5, 3, 3) and dx.shape == x.shape and not dw.any()
    assert adder_linear(torch.ones(0, 3, device=device), torch.ones(5, 3, device=device)).shape == (0, 5)


def test_nan_reaches_the_pixels_that_see_it_and_no_other(device):
    x = torch.ones(1, 2, 6, 6, device=device)
    x[0, 1, 2, 3] = float("nan")
    y = adder_conv2d(x, torch.zeros(4, 2, 3, 3, device=device))
    assert y[:, :, 0:3, 1:4].isnan().all() and y.isnan().sum() == 4 * 9


def test_each_has_its_own_dtype(generator, device):
    x, w = draw(generator, device, (2, 6, 5, 5), (4, 6, 3, 3))
    half = x.half().requires_grad_()
    y = adder_conv2d(half, w.requires_grad_())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, adder_conv2d(half.detach().float(), w).half(), rtol=1e-3, atol=0)
    dx, dw = torch.autograd.grad(y.sum(), (half, w))
    assert dx.dtype == torch.float16 and dw.dtype == torch.float32


X, W = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    "error, words, arguments, geometry",
    [
        (TypeError, "x must be float32 / float16 / bfloat16, got float64; cast x first", (X.double(), W), {}),
        (TypeError, "weight must be float32 / float16 / bfloat16, got int8", (X, W.char()), {}),
        (ValueError, r"x must be \[B, C, H, W\], got \[3, 5, 5\]", (X[0], W), {}),
        (ValueError, r"weight must be \[O, C, R, S\], each >= 1, got \[0, 3, 3, 3\]", (X, W[:0]), {}),
        (ValueError, r"the channels of x, 3, got \[4, 1, 3, 3\]; for groups, call it for each", (X, W[:, :1]), {}),
        (ValueError, "at least as large as the dilated kernel, got 5 x 5", (X, W), {"dilation": 3}),
        (ValueError, "stride must be at least 1, got 0", (X, W), {"stride": 0}),
        (ValueError, "weight must be on the device of x, cpu, got meta", (X, W.to("meta")), {}),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments, geometry):
    with pytest.raises(error, match=words):
        adder_conv2d(*arguments, **geometry)


@pytest.mark.parametrize(
    "error, words, x, weight",
    [
        (TypeError, "adder_linear: x must be a tensor, got list", [1.0], torch.ones(2, 3)),
        (ValueError, r"weight must be \[N, K\], each >= 1, got \[3\]", torch.ones(3), torch.ones(3)),
        (ValueError, r"x must be \[..., 3\], as weight is, got \[2, 4\]", torch.ones(2, 4), torch.ones(2, 3)),
    ],
)
def test_wrong_rows_are_refused(error, words, x, weight):
    with pytest.raises(error, match=words):
        adder_linear(x, weight)


def test_a_second_gradient_is_refused(device):
    x = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(adder_conv2d(x * x, torch.zeros(1, 1, 1, 1, device=device)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient has no gradient of its own"):
        dx.sum().backward()


@traced
def test_opcheck_of_every_op(generator):
    x, w = draw(generator, "cpu", (2, 3, 5, 4), (4, 3, 3, 3))
    window = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    y = OPS.adder_conv2d(x, w, window, "")
    x.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(OPS.adder_conv2d.default, (x, w, window, ""))
    torch.library.opcheck(OPS.adder_conv2d_dx.default, (torch.ones_like(y), x.detach(), w.detach(), window, ""))
    a, b = draw(generator, "cpu", (5, 7), (3, 7))
    torch.library.opcheck(OPS.adder_linear.default, (a.requires_grad_(), b.requires_grad_(), ""))


@traced
def test_it_compiles_to_one_graph_with_its_gradients(generator):
    x, w = draw(generator, "cpu", (2, 3, 5, 5), (4, 3, 3, 3))
    x.requires_grad_(), w.requires_grad_()

    def mean(x, w):
        return adder_linear(adder_conv2d(x, w, 2, 1).flatten(2), w.flatten(1)[:, :9]).square().mean()

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(run(x, w), (x, w)) for run in (compiled, mean)), strict=True):
        torch.testing.assert_close(got, want)
