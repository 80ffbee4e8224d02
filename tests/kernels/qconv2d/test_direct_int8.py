"""The C++ of 8-bit convolutions on a CPU against the reference, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gs_kernels import PackedWeight, pack_weight, qconv2d_int8
from gs_kernels.cpu import library
from gs_kernels.qconv2d.cpu import direct_int8, int8
from gs_kernels.qconv2d.ref import qconv2d_int8_ref
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter runs Triton's kernels instead")

HERE = direct_int8.kernels() is not None
GEOMETRIES: dict[str, dict[str, Any]] = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (5, 3), "padding": (2, 0), "stride": (2, 3)},
    "dilated": {"kernel_size": 3, "padding": 4, "dilation": (2, 3)},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "larger than the image": {"kernel_size": 11, "padding": 5},
}


def weight(channels: int, taps: int, bits: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(channels + taps)
    codes = torch.randint(2**bits, (channels, taps), generator=generator, dtype=torch.uint8)
    scale = torch.linspace(-0.02, 0.03, channels).view(-1, 1)
    return pack_weight(codes, scale, torch.full((channels, 1), 2.0 ** (bits - 1)), bits=bits, group_size=taps)


def image(channels: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-128, 128, (batch, channels, 7, 9), generator=generator, dtype=torch.int8)


@pytest.mark.skipif(not HERE, reason="needs a C++ compiler")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels, bits", [(16, 8), (80, 8), (144, 4), (32, 1)])
def test_depthwise_is_the_reference(geometry: str, channels: int, bits: int):
    about: dict[str, Any] = {**GEOMETRIES[geometry], "groups": channels}
    size = about["kernel_size"]
    taps = size[0] * size[1] if isinstance(size, tuple) else size * size
    w, x, bias = weight(channels, taps, bits), image(channels), torch.linspace(-3, 3, channels)
    x_scale, grid = torch.tensor([0.05]), {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([-100.0])}
    for activation in ("none", "relu", "relu6"):
        for zero in (None, torch.tensor([-7.0])):
            for out in ({}, grid):
                options = {**about, **out, "x_zero": zero, "activation": activation}
                got = qconv2d_int8(x, x_scale, w, bias, **options)
                assert torch.equal(got, qconv2d_int8_ref(x, x_scale, w, bias, **options)), (activation, zero, out)
    assert torch.equal(qconv2d_int8(x, x_scale, w, **about), qconv2d_int8_ref(x, x_scale, w, **about))
    first_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(qconv2d_int8(first_last, x_scale, w, **about), qconv2d_int8(x, x_scale, w, **about))


@pytest.mark.skipif(not HERE, reason="needs a C++ compiler")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("inputs, channels, bits", [(1, 16, 8), (3, 24, 4), (16, 37, 8), (24, 1, 2)])
def test_all_channels_in_one_call_are_the_reference(
    geometry: str, inputs: int, channels: int, bits: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "DENSE_UP_TO", 1 << 40)
    about: dict[str, Any] = GEOMETRIES[geometry]
    size = about["kernel_size"]
    taps = size[0] * size[1] if isinstance(size, tuple) else size * size
    w, x, bias = weight(channels, inputs * taps, bits), image(inputs), torch.linspace(-3, 3, channels)
    x_scale, grid = torch.tensor([0.05]), {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([-100.0])}
    for activation, zero, out in (("none", None, {}), ("relu", torch.tensor([-7.0]), grid), ("relu6", None, grid)):
        options = {**about, **out, "x_zero": zero, "activation": activation}
        want = qconv2d_int8_ref(x, x_scale, w, bias, **options)
        assert torch.equal(qconv2d_int8(x, x_scale, w, bias, **options), want)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(qconv2d_int8(last, x_scale, w, bias, **options), want)


@pytest.mark.skipif(not HERE, reason="needs a C++ compiler")
def test_sums_of_the_ends_of_the_range_are_exact_in_one_call():
    x, zero = torch.full((1, 16384, 1, 2), 127, dtype=torch.int8), torch.tensor([-128.0])
    w = pack_weight(torch.zeros(2, 16384, dtype=torch.uint8), torch.ones(2, 1), 128.0, bits=8, group_size=16384)
    y = qconv2d_int8(x, torch.ones(1), w, kernel_size=1, x_zero=zero)
    assert y.flatten().tolist() == [-255.0 * 128 * 16384] * 4


@pytest.mark.skipif(not HERE, reason="needs a C++ compiler")
@pytest.mark.parametrize("side, in_one_call", [(3, 0), (17, 0), (5, 1 << 40)], ids=["matrices", "oneDNN", "one call"])
@pytest.mark.parametrize("channels, bits", [(1, 8), (7, 4), (16, 8), (37, 1)])
def test_what_follows_the_sums_is_the_reference(
    side: int, in_one_call: int, channels: int, bits: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "DENSE_UP_TO", in_one_call)
    monkeypatch.setattr(int8, "PIXELS", 4 if side == 17 else 1 << 30)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-128, 128, (2, 24, side, side), generator=generator, dtype=torch.int8)
    w, bias, x_scale = weight(channels, 24, bits), torch.linspace(-3, 3, channels), torch.tensor([0.05])
    size = (2, channels, side, side)
    codes = torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
    real = torch.randn(size, generator=generator)
    real[0, 0, 0, 0] = torch.nan
    scaled = {"residual_scale": torch.tensor([0.03])}
    for residual in (
        {},
        {"residual": real.contiguous(memory_format=torch.channels_last)},
        {"residual": codes, **scaled},
        {"residual": codes, **scaled, "residual_zero": torch.tensor([9.0])},
    ):
        for out in ({}, {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([-100.25])}):
            for activation, zero in (("none", None), ("relu", torch.tensor([-7.0])), ("relu6", None)):
                options = {"kernel_size": 1, "x_zero": zero, "activation": activation, **residual, **out}
                got = qconv2d_int8(x, x_scale, w, bias, **options)
                want = qconv2d_int8_ref(x, x_scale, w, bias, **options)
                assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9)), (residual.keys(), activation, out)


@pytest.mark.skipif(not HERE, reason="needs a C++ compiler")
def test_what_it_cannot_do_goes_another_way():
    x_scale, about = torch.tensor([0.05]), {"kernel_size": 3, "padding": 1}
    for channels, options in (
        (24, {}),  # not a multiple of 16
        (32, {"activation": "silu"}),
        (32, {"dtype": torch.float16}),
        (32, {"residual": torch.ones(2, 32, 7, 9)}),
    ):
        w, x = weight(channels, 9, 8), image(channels)
        got, want = (f(x, x_scale, w, **about, groups=channels, **options) for f in (qconv2d_int8, qconv2d_int8_ref))
        assert got.dtype == want.dtype and relative_rms(got, want) < 1e-3
    assert qconv2d_int8(image(32, 0), x_scale, weight(32, 9, 8), **about, groups=32).shape == (0, 32, 7, 9)


def test_code_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(direct_int8, "self_test", lambda functions: False)
    monkeypatch.setattr(library, "_problems", {})
    direct_int8.kernels.cache_clear()
    try:
        w, x = weight(32, 9, 8), image(32)
        about = {"kernel_size": 3, "padding": 1, "groups": 32}
        got = qconv2d_int8(x, torch.ones(1), w, **about)
        assert torch.equal(got, qconv2d_int8_ref(x, torch.ones(1), w, **about))
        assert not HERE or "compute wrong results" in caplog.text
    finally:
        direct_int8.kernels.cache_clear()
