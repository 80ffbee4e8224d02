"""Convolutions of floats on a CPU, with filters that are kept in the order oneDNN multiplies them in."""

import weakref

import pytest
import torch
from torch.nn import functional as F

from gs_kernels import dequantize_packed, pack_weight, qconv2d
from gs_kernels.qconv2d.cpu import float as module
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.torch_private import prepack_filters

pytestmark = pytest.mark.skipif(INTERPRET or prepack_filters is None, reason="a CPU with oneDNN prepacks")
CASES = {
    "3 x 3": ((2, 32, 17, 15), 32, (3, 3), {"padding": 1}),
    "strides": ((1, 32, 17, 15), 48, (3, 3), {"padding": 1, "stride": 2}),
    "dilation": ((1, 32, 17, 15), 32, (3, 3), {"padding": 2, "dilation": 2}),
    "groups": ((1, 64, 17, 15), 64, (3, 3), {"padding": 1, "groups": 4}),
    "depthwise": ((1, 128, 33, 33), 128, (3, 3), {"padding": 1, "groups": 128}),
    "uneven padding": ((1, 32, 17, 15), 32, (2, 4), {"padding": "same"}),
    "points": ((1, 256, 16, 16), 256, (1, 1), {}),
}


def weight(o: int, channels: int, taps: tuple[int, int], dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws 4-bit codes; returns the packed weight and the filters that it stands for."""
    draw = torch.Generator().manual_seed(0)
    k = channels * taps[0] * taps[1]
    codes = torch.randint(0, 16, (o, k), generator=draw, dtype=torch.uint8)
    packed = pack_weight(codes, torch.rand(o, 1, generator=draw) + 0.5, 8.0, bits=4)
    filters = dequantize_packed(packed, dtype).double().view(o, *taps, channels).permute(0, 3, 1, 2)
    return packed, filters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, o, taps, geometry", CASES.values(), ids=CASES)
def test_kept_filters_give_the_sums_of_float64(monkeypatch, size, o, taps, geometry, dtype):
    packed, filters = weight(o, size[1] // geometry.get("groups", 1), taps, dtype)
    prepacked = []
    real = module.prepack_filters
    monkeypatch.setattr(module, "prepack_filters", lambda *args: prepacked.append(args) or real(*args))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(size, generator=draw).to(dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(o, generator=draw)
    for images in (x, torch.cat([x, 2 * x]), torch.cat([x, 2 * x, x])):  # filters of several images serve others
        y = qconv2d(images, packed, bias, kernel_size=taps, **geometry, activation="relu", keep_dense=True)
        want = F.relu(F.conv2d(images.double(), filters, bias.to(dtype).double(), **geometry))
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        error = (y.double() - want).norm() / want.norm()
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)
    assert [args[-1][0] for args in prepacked] == sorted({min(len(x), 2), 2})


def test_filters_are_laid_for_four_sizes_of_images_at_most(monkeypatch):
    packed, filters = weight(32, 32, (3, 3))
    prepacked, real = [], module.prepack_filters
    monkeypatch.setattr(module, "prepack_filters", lambda *args: prepacked.append(args[-1]) or real(*args))
    draw = torch.Generator().manual_seed(1)
    sizes = [(1, 32, 16, 16), (2, 32, 16, 16), (3, 32, 16, 16), (1, 32, 16, 17), (1, 32, 20, 16), (1, 32, 24, 16)]
    for size in [*sizes, *sizes]:
        x = torch.randn(size, generator=draw)
        want = F.conv2d(x.double(), filters, padding=1)
        y = qconv2d(x, packed, kernel_size=3, padding=1, keep_dense=True)
        assert (y.double() - want).norm() / want.norm() < 1e-6
    assert [tuple(size) for size in prepacked] == [sizes[0], sizes[1], sizes[3], sizes[4]]


def test_a_changed_weight_is_prepacked_again():
    size, o, taps, geometry = CASES["3 x 3"]
    packed, _ = weight(o, size[1], taps)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    before = qconv2d(x, packed, kernel_size=taps, **geometry, keep_dense=True)
    packed.scale.mul_(2)
    torch.testing.assert_close(qconv2d(x, packed, kernel_size=taps, **geometry, keep_dense=True), 2 * before)


def test_a_small_call_keeps_the_filters_as_they_are(monkeypatch):
    monkeypatch.setattr(module, "prepack_filters", None)
    packed, filters = weight(8, 8, (3, 3))
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    y = qconv2d(x, packed, kernel_size=3, keep_dense=True)
    torch.testing.assert_close(y, F.conv2d(x, filters.float()))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_few_products_of_pixels_alone_are_those_of_a_matrix(monkeypatch, memory_format):
    monkeypatch.setattr(module, "prepack_filters", None)
    packed, filters = weight(24, 16, (1, 1))
    draw = torch.Generator().manual_seed(1)
    x, bias = (
        torch.randn(3, 16, 7, 5, generator=draw).contiguous(memory_format=memory_format),
        torch.randn(24, generator=draw),
    )
    x[1, 2, 3, 4] = float("nan")
    y = qconv2d(x, packed, bias, kernel_size=1, activation="relu", keep_dense=True)
    want = F.relu(F.conv2d(x.double(), filters, bias.double())).float()
    torch.testing.assert_close(y, want, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("avx512", [True, False])
def test_a_matrix_product_wins_longer_without_avx512(monkeypatch, avx512):
    packed, filters = weight(64, 64, (1, 1))
    prepacked, real = [], module.prepack_filters
    monkeypatch.setattr(module, "prepack_filters", lambda *args: prepacked.append(args) or real(*args))
    monkeypatch.setattr(module, "has", lambda name: avx512 and name == "avx512_f")
    x = torch.randn(1, 64, 28, 28, generator=torch.Generator().manual_seed(1))  # 3.2 million products
    y = qconv2d(x, packed, kernel_size=1, keep_dense=True)
    want = F.conv2d(x.double(), filters)
    assert (y.double() - want).norm() / want.norm() < 1e-6
    assert len(prepacked) == avx512


def test_a_repeated_call_sees_what_has_changed():
    packed, filters = weight(8, 8, (3, 3))
    x, bias = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(8)

    def call(x=x, bias=bias, **more):
        return qconv2d(x, packed, bias, kernel_size=3, keep_dense=True, **more)

    call()
    residual = torch.ones(1, 8, 3, 3)
    bias.add_(1)
    packed.scale.mul_(2)
    want = F.conv2d(x, 2 * filters.float(), bias)
    torch.testing.assert_close(call(), want)
    torch.testing.assert_close(call(activation="relu"), want.relu())
    torch.testing.assert_close(call(residual=residual), want + 1)
    torch.testing.assert_close(call(torch.cat([x, x])), torch.cat([want, want]))
    torch.testing.assert_close(call(x.double().float(), bias.bfloat16()), want)
    with pytest.raises(ValueError, match="bias must have shape"):
        call(bias=torch.zeros(9))
    with pytest.raises(TypeError, match="bias must be a tensor"):
        call(bias=1.0)
    with torch.autocast("cpu"):
        torch.testing.assert_close(call(), want)
    bias.requires_grad_()
    call().sum().backward()
    assert bias.grad.tolist() == [9.0] * 8


def test_a_weight_takes_along_what_was_kept():
    packed, _ = weight(8, 8, (3, 3))
    qconv2d(torch.ones(1, 8, 5, 5), packed, kernel_size=3, keep_dense=True)
    codes = weakref.ref(packed.codes)
    del packed
    assert codes() is None
