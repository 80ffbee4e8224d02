"""What layers prepare once follows every change of their tensors and of the backend that is forced."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SimQAT, quantize_weights
from gs_kernels.runtime.dispatch import UnsupportedError


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


X = normal(1, 4, 6, 6)


def packed_conv() -> Any:
    torch.manual_seed(0)
    (layer,) = quantize_weights(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), "int4@channel")
    return layer


def converted(**options: Any) -> Any:
    torch.manual_seed(0)
    algo = SimQAT(**options)
    net = algo.apply(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), X)
    net(X)
    return algo.convert(net.eval(), X)


def by_floats(conv: Any) -> Tensor:
    return F.conv2d(X, conv.weight, conv.bias, padding=1)


CHANGES = {
    "a scale in place": lambda conv: conv.scale.mul_(2),
    "codes in place": lambda conv: conv.codes.zero_(),
    "another scale": lambda conv: setattr(conv, "scale", conv.scale * 3),
    "a bias in place": lambda conv: conv.bias.add_(1),
    "a bias through .data": lambda conv: conv.bias.data.add_(1),
    "another bias": lambda conv: setattr(conv, "bias", nn.Parameter(conv.bias + 1, requires_grad=False)),
    "a state_dict": lambda conv: conv.load_state_dict(
        {k: v * 2 for k, v in conv.state_dict().items() if k != "codes"}, strict=False
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_packed_convolution_follows_its_tensors(change: str):
    conv = packed_conv()
    before = conv(X)
    CHANGES[change](conv)
    after = conv(X)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, by_floats(conv))


def test_a_bias_that_is_trained_has_a_gradient_after_calls_without():
    conv = packed_conv()
    with torch.no_grad():
        conv(X)
    conv.bias.requires_grad_(True)
    conv(X).sum().backward()
    assert conv.bias.grad.tolist() == [36.0] * 8


def test_autocast_casts_what_was_prepared_without_it():
    conv = packed_conv()
    with torch.no_grad():
        conv(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(X).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("site", ["0", "3"])
def test_a_converted_layer_follows_the_grid_of_its_input(site: str):
    net = converted()
    before = net(X)
    grid = net.get_submodule(site).input_quantizer
    grid.scale.mul_(0.5)
    after, anew = net(X), copy.deepcopy(net)(X)
    assert torch.equal(after, anew) and not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("site", ["0", "3"])
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_converted_layer_that_multiplies_floats_follows_its_tensors(site: str, name: str):
    net = converted(act=None)
    before = net(X)
    net.get_submodule(site)._buffers[name].mul_(2)
    after, anew = net(X), copy.deepcopy(net)(X)
    assert torch.equal(after, anew) and not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("make", [packed_conv, converted])
def test_a_forced_backend_counts_in_calls_after_the_first(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GS_BACKEND", raising=False)
    layer = make()
    layer(X)
    monkeypatch.setenv("GS_BACKEND", "none")
    with pytest.raises(UnsupportedError, match="GS_BACKEND must be one of triton, cpu, ref, got 'none'"):
        layer(X)


@torch.no_grad()
@pytest.mark.parametrize("make", [packed_conv, converted])
def test_a_copy_is_of_its_own_tensors(make: Any):
    layer = make()
    want = layer(X)
    other = copy.deepcopy(layer)
    other.state_dict()["scale" if make is packed_conv else "3.scale"].zero_()
    assert torch.equal(layer(X), want) and not torch.equal(other(X), want)


@torch.no_grad()
@pytest.mark.parametrize("make", [packed_conv, converted])
def test_a_layer_that_is_dropped_leaves_no_memory_to_the_garbage_collector(make: Any):
    layer = make()
    layer(X)
    part = layer if make is packed_conv else layer[0]
    codes = weakref.ref(part.codes)
    gc.collect()
    gc.disable()
    try:
        del layer, part
        assert codes() is None
    finally:
        gc.enable()
