"""Equalize: ranges of channels become equal in layers that follow one another, and the network computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.ptq.ptq import PTQ
from gs_algos.ptq.transforms.equalize import (
    column_ranges,
    divide_rows,
    equalize,
    find_chains,
    multiply_columns,
    pair_scale,
    row_ranges,
    triple_scales,
)


@torch.no_grad()
def net(act=nn.ReLU, depthwise: bool = True) -> nn.Sequential:
    """Channels of very different ranges that count alike, as folded batch norms leave them."""
    torch.manual_seed(0)
    middle = [nn.Conv2d(8, 8, 3, padding=1, groups=8), act()] if depthwise else []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), act(), *middle, nn.AvgPool2d(2), nn.Conv2d(8, 6, 1)).eval()
    scale = torch.logspace(-2, 1, 8)
    divide_rows(model[0], scale)
    multiply_columns(model[2 if depthwise else 3], scale)
    return model


def images(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y) + y


@pytest.mark.parametrize(("depthwise", "chains"), [(False, [("0", "3")]), (True, [("0", "2", "5")])])
def test_the_network_computes_the_same_and_ranges_are_equal(depthwise, chains):
    model, x = net(depthwise=depthwise), images()[0]
    with torch.no_grad():
        want = model(x)
        assert equalize(model, x) == chains
        got = model(x)
    assert float((got - want).norm() / want.norm()) <= 1e-5
    *firsts, last = (model.get_submodule(name) for name in chains[0])
    for layer in firsts:
        torch.testing.assert_close(row_ranges(layer), column_ranges(last), rtol=0.02, atol=0)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
def test_only_what_keeps_scales_may_lie_between(act):
    assert find_chains(net(act), images()[0]) == []
    assert find_chains(net(nn.LeakyReLU), images()[0]) == [("0", "2", "5")]


def test_a_tensor_that_two_read_is_left():
    assert find_chains(Residual().eval(), images()[0]) == []


def test_layers_called_twice_or_with_a_shared_weight_are_left():
    layer = nn.Linear(4, 4)
    assert find_chains(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(2, 4)) == []
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    assert find_chains(nn.Sequential(layer, nn.ReLU(), other).eval(), torch.randn(2, 4)) == []


def test_grouped_convolutions_have_their_columns_by_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 2, groups=2)).eval()
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        want = model(x)
        assert equalize(model, x) == [("0", "2")]
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-6)


def test_channels_of_zeros_keep_their_scale():
    m = torch.tensor([0.0, 4.0, 1.0])
    torch.testing.assert_close(pair_scale(m, torch.tensor([1.0, 1.0, 0.0])), torch.tensor([1.0, 2.0, 1.0]))
    one, two = triple_scales(m, torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(one, torch.tensor([1.0, 2.0, 1.0]))
    torch.testing.assert_close(two, torch.tensor([1.0, 2.0, 1.0]))


@torch.no_grad()
def test_per_tensor_weights_lose_less_and_the_packed_network_is_loaded(tmp_path):
    data = images()
    want = net()(data[0])
    errors = []
    for transforms in ((), ("equalize",)):
        algo = PTQ(weight="int4@tensor", rounding="nearest", transforms=transforms)
        notes = algo.plan(net(), data[0]).notes
        assert ("equalize: 0, 2, 5" in notes) == bool(transforms)
        model = algo.apply(net(), data[0])
        algo.calibrate(model, data)
        model = algo.convert(model)
        errors.append(float((model(data[0]) - want).norm() / want.norm()))
    assert errors[1] < 0.5 * errors[0], errors
    gs_algos.save(model, tmp_path / "packed")
    torch.testing.assert_close(gs_algos.load(tmp_path / "packed", net)(data[0]), model(data[0]), rtol=0, atol=0)


def norms() -> nn.Sequential:
    """A network whose batch norms give channels very different ranges."""
    model = net(depthwise=False)
    norm = nn.BatchNorm2d(8).eval()
    norm.load_state_dict({key: torch.logspace(-2, 1, 8) for key in ("weight", "running_var")}, strict=False)
    return nn.Sequential(model[0], norm, *list(model)[1:]).eval()


@torch.no_grad()
def test_beside_static_activations_batch_norms_are_folded_before():
    data, errors = images(), []
    want = norms()(data[0])
    for transforms in ((), ("equalize",)):
        algo = PTQ(weight="int4@tensor", act="int8@tensor", rounding="nearest", transforms=transforms)
        assert ("equalize: 0, 4" in algo.plan(norms(), data[0]).notes) == bool(transforms)
        model = algo.apply(norms(), data[0])
        algo.calibrate(model, data)
        errors.append(float((algo.convert(model)(data[0]) - want).norm() / want.norm()))
    assert errors[1] < 0.8 * errors[0], errors


def test_a_refused_apply_gives_the_values_back():
    model, bad = norms(), images()[0]
    bad[0, 0, 0, 0] = torch.nan
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        PTQ(weight="int4@tensor", act="int8@tensor", transforms=("equalize",)).apply(model, bad)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)
