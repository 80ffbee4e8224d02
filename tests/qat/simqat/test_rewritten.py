"""Networks whose layers are functions, and batch norms that hold an activation: quantized, converted and reloaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SimQAT
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLinear
from gs_algos.quant.network import convert
from tests.nets.graphs import Chain, Functional, NormAct, image


class FunctionalBlock(nn.Module):
    """A conv by function in front of a batch norm by module."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator) / 5)
        self.bias = nn.Parameter(torch.randn(8, generator=generator))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(F.conv2d(x, self.kernel, self.bias, padding=1))).mean((2, 3))


def inner() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(FunctionalBlock(), nn.Linear(8, 4))


def norm_act() -> nn.Module:
    torch.manual_seed(0)
    return Chain(conv=nn.Conv2d(3, 4, 3), bn=NormAct(4), head=nn.Conv2d(4, 2, 1))


class PaddedConv(nn.Conv2d):
    """Pads on one side as TensorFlow does, then convolves by function: EfficientNets hold such layers."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def padded() -> nn.Module:
    torch.manual_seed(0)
    return Chain(conv=PaddedConv(3, 4, 3, stride=2, bias=False), bn=nn.BatchNorm2d(4), head=PaddedConv(4, 2, 1))


def trained(build, **options):
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    algo = SimQAT(**options)
    net = algo.apply(net, image())
    for seed in range(4):
        net.train()
        net(image(batch=2 + seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    return net.eval(), algo


@torch.no_grad()
def inferred(net: nn.Module) -> torch.Tensor:
    return net(image())


NETS = {"root": (Functional, 2), "inner": (inner, 2), "norm_act": (norm_act, 2), "padded": (padded, 2)}


@pytest.mark.parametrize("fold, freeze", [("one_conv", None), ("two_conv", None), ("none", 2), ("two_conv", 2)])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_quantized_and_converts_to_the_trained_function(name, fold, freeze, tmp_path):
    build, layers = NETS[name]
    net, algo = trained(build, fold_bn=fold, freeze_bn=freeze)
    want, names = inferred(net), [n for n, _ in build().named_parameters()]
    assert [n for n, _ in net.named_parameters()] == names
    prepared = gs_algos.load(gs_algos.save(net, tmp_path / "prepared"), build).eval()
    assert torch.equal(inferred(prepared), want)
    net = algo.convert(net)
    assert sum(isinstance(m, (QuantizedConv, QuantizedLinear)) for m in net.modules()) == layers
    assert torch.equal(net(image()), want)
    again = gs_algos.load(gs_algos.save(net, tmp_path / "converted"), build).eval()
    assert torch.equal(again(image()), net(image()))


def test_a_converted_function_leaves_no_float_weight_behind():
    net, algo = trained(inner)
    assert "0.kernel" in net.state_dict()
    state = algo.convert(net).state_dict()
    assert not {"0.kernel", "0.bias", "1.weight"} & state.keys() and net[0].kernel is None
    assert state["0.kernel_conv2d.codes"].dtype == torch.uint8


def test_planning_functional_layers_touches_nothing():
    net = inner()
    modules, state = dict(net.named_modules()), copy.deepcopy(net.state_dict())
    plan = SimQAT().plan(net, image())
    assert [(row.site, row.kind) for row in plan.acted()] == [("0.kernel_conv2d", "F.conv2d"), ("1", "Linear")]
    assert dict(net.named_modules()) == modules and type(net[0]) is FunctionalBlock
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))


def test_what_stays_functional_is_a_line_and_a_note_in_the_plan():
    class Branching(FunctionalBlock):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    net = nn.Sequential(Branching(), nn.Linear(8, 4))
    algo = SimQAT()
    plan = algo.plan(net, image())
    assert [row.site for row in plan.kept()] == ["0.kernel", "0.bn"] and "functional conv2d" in plan.kept()[0].reason
    assert any("0 stays functional" in note for note in plan.notes)
    assert type(algo.apply(net, image())[0]) is Branching


def test_an_activation_inside_a_norm_still_runs_behind_the_fold():
    net, algo = trained(norm_act, fold_bn="two_conv")
    assert net.bn(net.conv(image())).min().item() == 0.0
    net = algo.convert(net)
    assert isinstance(net.bn.act, nn.ReLU) and "bn.running_mean" not in net.state_dict()


class Summed(nn.Module):
    """Two convs whose batch norms hold an activation, which the sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn, self.b, self.b_bn = nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(3, 4, 3), NormAct(4)

    def forward(self, x):
        return self.a_bn(self.a(x)) + self.b_bn(self.b(x))


def test_a_layer_behind_whose_activation_values_are_rounded_is_not_held_to_the_last_bit(monkeypatch):
    torch.manual_seed(0)
    net, algo = Summed(), SimQAT()
    assert [row.site for row in algo.plan(net, image()).acted()] == ["a", "b", "add of a_bn.act, b_bn.act"]
    algo.apply(net, image())
    monkeypatch.setitem(convert.LAYER_TOLERANCE, torch.float32, -1.0)
    algo.convert(net)
    assert algo.parity.layer_error < 1e-2
