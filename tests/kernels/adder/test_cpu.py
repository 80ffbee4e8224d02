"""Facts of the C++ of L1 products beyond conformance: threads, layouts, sizes around blocks, what is prepared."""

from __future__ import annotations

import contextlib

import pytest
import torch

from gs_kernels import adder_conv2d, adder_int8, adder_linear
from gs_kernels.adder.cpu import float as floats
from gs_kernels.adder.cpu import int8
from gs_kernels.adder.geometry import forward_axis, gradient_axis
from gs_kernels.adder.ref import adder_conv2d_ref, adder_int8_ref
from gs_kernels.for_layers import prepared_adder_int8
from gs_kernels.runtime.dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
ONE = torch.ones(1)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def codes(generator, *shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def draw(generator, *shapes):
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch, generator):
    for module in (floats, int8):
        monkeypatch.setattr(module, "PARALLEL_FROM", 1)
    x, w = draw(generator, (2, 7, 13, 11), (19, 7, 3, 3))
    x.requires_grad_(), w.requires_grad_()
    image, filters = codes(generator, 2, 7, 13, 11), codes(generator, 19, 7, 3, 3)

    def everything():
        y = adder_conv2d(x, w, 2, 1)
        sums = adder_int8(image, filters, stride=2, padding=1)
        return [y, *torch.autograd.grad(y.sin().sum(), x), sums, adder_int8(image, filters, ONE, padding=1)]

    with threads(1):
        want = everything()
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


@pytest.mark.parametrize("k", [1, 255, 256, 257, 600])
def test_sums_of_several_chunks(k, generator):
    x, w = draw(generator, (5, k), (9, k))
    want = -(x.double()[:, None] - w.double()).abs().sum(2)
    torch.testing.assert_close(adder_linear(x, w).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [15, 16, 17, 47, 48, 49, 100])
@pytest.mark.parametrize("layout", ["dense", "channels_last", "expanded"])
def test_pixels_of_every_number_and_layout(width, layout, generator):
    x, w = draw(generator, (2, 3, 2, width), (5, 3, 1, 1))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        x = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(adder_conv2d(x, w), adder_conv2d_ref(x, w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("o", [1, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("c", [1, 8, 9])
def test_codes_of_every_number_of_channels(o, c, generator):
    x, w = codes(generator, 1, c, 5, 6), codes(generator, o, c, 2, 3)
    got = adder_int8(x, w, padding=1, zero=ONE)
    assert torch.equal(got, adder_int8_ref(x, w, padding=1, zero=ONE))


def test_what_is_prepared_takes_images_of_any_size(generator):
    w, scale, bias = codes(generator, 6, 3, 3, 3), torch.full((6,), 0.01), torch.ones(6)
    fixed = {"stride": 1, "padding": 1, "dilation": 1, "zero": None, "activation": "relu", "dtype": torch.float32}
    fixed |= {"out_scale": torch.full((1,), 0.1), "out_zero": ONE}
    run = prepared_adder_int8(codes(generator, 1, 3, 4, 4), w, scale, bias, **fixed)
    for size in (4, 9):
        x, residual = codes(generator, 2, 3, size, size), codes(generator, 2, 6, size, size)
        added = {"residual": residual, "residual_scale": ONE / 8, "residual_zero": ONE}
        assert torch.equal(run(x), adder_int8_ref(x, w, scale, bias, **fixed))
        assert torch.equal(run(x, *added.values()), adder_int8_ref(x, w, scale, bias, **fixed, **added))


@pytest.mark.parametrize("zero", [0.5, 128.0, -129.0])
def test_a_zero_point_that_is_no_code_is_refused(zero):
    x = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"zero must be a whole number from -128 to 127, got {zero}"):
        adder_int8(x, x, zero=torch.full((1,), zero))


def test_without_a_compiler_operations_give_the_same(monkeypatch, generator):
    x, w = draw(generator, (2, 4, 6, 5), (3, 4, 3, 3))
    image, filters = codes(generator, 2, 4, 6, 5), codes(generator, 3, 4, 3, 3)

    def everything():
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = adder_conv2d(a, b, 2, 1)
        rows = adder_linear(a.flatten(1), b[:2].flatten(1).repeat(1, 4)[:, :120])
        return [y, *torch.autograd.grad(y.sum(), (a, b)), rows, adder_int8(image, filters, ONE, zero=ONE, padding=1)]

    want = everything()
    for module in (floats, int8):
        monkeypatch.setattr(module, "kernels", lambda: None)
    for got, wanted in zip(everything(), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
    assert prepared_adder_int8(image, filters, ONE, None, **FIXED) is None


FIXED = {"stride": 1, "padding": 0, "dilation": 1, "zero": None, "activation": "none", "dtype": torch.float32}
FIXED |= {"out_scale": None, "out_zero": None}


def test_an_axis_says_where_taps_are():
    # taps 0, 2, 4 at stride 2: all of the even phase, one pixel apart
    assert forward_axis(3, 2, 2, 1, 5) == ((0,), ((0, 0), (0, 1), (0, 2)), 7, 1)
    phases, pixels, before = gradient_axis(3, 2, 1, 1, 5)
    # an even pixel is met by tap 1, an odd one by 0 and 2
    assert [phase.taps for phase in phases] == [(1,), (0, 2)]
    assert [phase.starts for phase in phases] == [(0,), (1, 0)] and (pixels, before) == (4, 0)
