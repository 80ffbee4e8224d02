"""Where the milliseconds of a forward go. No test asserts how long anything takes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos.analysis import latency
from gs_algos.analysis.latency import LayerTimes, layer_times
from tests.nets.convolutional import SmallConvNet, images, mlp
from tests.nets.language_models import IDS, tiny_llama


class Skip(nn.Module):
    """A residual block whose other branch is what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((x + self.conv2(self.conv1(x).relu())).relu().mean((2, 3)))


def converted(net: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    algo = gs_algos.PTQ(weight="int8@channel", act="int8@tensor")
    net = algo.apply((net or SmallConvNet()).eval(), images(2))
    algo.calibrate(net, [images(8)])
    return algo.convert(net, images(2))


@pytest.fixture
def ticks(monkeypatch) -> None:
    """A clock that goes on by 1 ms each time it is read: a span takes as many as it and those inside read it."""
    count = itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(count) / 1000)


def test_layers_and_rest_add_up_to_the_network():
    found = layer_times(mlp(), torch.ones(4, 16), seconds=0.0)
    assert list(found.layers) == ["0", "1", "2", "3", "4"]
    assert found.total == pytest.approx(sum(found.layers.values()) + found.rest)
    assert found.batch == 4 and found.hooked > 0


def test_a_layer_that_is_called_twice_has_the_sum(ticks):
    layer = nn.Linear(4, 4)
    found = layer_times(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(2, 4), seconds=0.0)
    assert found.layers == pytest.approx({"0": 2.0, "1": 1.0})


def test_a_converted_layer_is_one_with_its_quantizers():
    found = layer_times(converted(), images(2), seconds=0.0)
    assert {"stem", "block.conv1", "block.conv2", "fc"} <= found.layers.keys()
    assert not any("input_quantizer" in name for name in found.layers)


def test_what_a_convolution_leaves_to_an_add_is_its_own_time(ticks):
    net = converted(Skip())
    assert net.conv2.defers_add
    found = layer_times(net, images(2), seconds=0.0)
    assert found.layers["conv2"] == pytest.approx(1 + found.layers["conv1"])


def test_the_network_is_left_as_it_was():
    net = converted().train()
    want = copy.deepcopy(net).eval()(images(4))
    layer_times(net, images(4), seconds=0.0)
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net.eval()(images(4)), want)


def test_a_language_model_has_its_layers():
    found = layer_times(gs_algos.quantize_weights(tiny_llama(), "int4@group:32"), IDS, seconds=0.0)
    assert "model.layers.1.mlp.down_proj" in found.layers and "model.norm" in found.layers


class Experts(nn.Module):
    """Holds weights of its own, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(4, 4)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x @ self.weight)


def test_a_module_that_holds_all_its_parameters_is_a_layer():
    assert list(layer_times(nn.Sequential(Experts()), torch.ones(2, 4), seconds=0.0).layers) == ["0"]


def test_times_that_do_not_add_up_are_said():
    text = str(LayerTimes(10.0, {"a": 4.0}, 6.0, False, 1, 12.0))
    assert "with hooks it took 12.000 ms" in text and "within 10 %" in text
    assert "with hooks" not in str(LayerTimes(10.0, {"a": 4.0}, 6.0, True, 1, 10.5))


class Slower(nn.Module):
    """Takes 20 ticks of the clock, 40 if it is watched."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(40 if self._forward_hooks else 20):
            latency.time.perf_counter()
        return x


def test_a_forward_that_hooks_make_slower_does_not_agree(ticks):
    found = layer_times(nn.Sequential(Slower()), torch.ones(1), seconds=0.0)
    assert not found.agrees and found.hooked > 1.1 * found.total


def test_inputs_that_do_not_run_are_refused():
    with pytest.raises(ValueError, match="layer_times: the inputs must run through the model"):
        layer_times(mlp(), torch.ones(4, 5))
