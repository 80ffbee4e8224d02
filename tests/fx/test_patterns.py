"""Patterns and their guards: what matches, and the reason in words where a trap is refused."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

from gs_algos.fx.capture.capture import capture
from gs_algos.fx.op_names import SITES
from gs_algos.fx.patterns import match
from tests.nets.graphs import (
    Chain,
    ConvCalledTwice,
    ConvIsAlsoOutput,
    DropPath,
    FlatOpaque,
    Functional,
    NormAct,
    NormBeforeConv,
    OneConvTwoNorms,
    OneNormTwoConvs,
    Opaque,
    ParallelBranches,
    StandardisedConv,
    TiedConvs,
    UnknownToExport,
    WeightReadElsewhere,
    found,
    image,
    reasons,
    roles,
)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardswish(), nn.SiLU(), nn.GELU("tanh")])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_norm_activation(dim, act):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim](3, 4, 3)
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim](4)
    net = Chain(conv=conv, bn=bn, act=act)
    assert roles(net, torch.ones(2, 3, *[5] * dim)) == [{"conv": "conv", "bn": "bn", "act": "act"}]


@pytest.mark.parametrize("function", [F.relu, F.relu6, F.hardswish, F.silu, F.gelu, torch.relu, torch.relu_])
def test_functional_activation(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return function(self.conv(x))

    assert roles(Net(), image()) == [{"conv": "conv", "act": f"F.{function.__name__.rstrip('_')}"}]


def test_linear_norm_activation():
    net = Chain(fc=nn.Linear(6, 4), bn=nn.BatchNorm1d(4), act=nn.ReLU())
    assert roles(net, torch.ones(2, 6)) == [{"linear": "fc", "bn": "bn", "act": "act"}]


def test_the_same_roles_on_the_symbolic_trace_rung():
    assert roles(UnknownToExport(), image()) == [
        {"conv": "conv", "bn": "bn", "act": "F.relu"},
        {"linear": "fc", "bn": "bn1"},
    ]


def test_a_norm_over_another_axis_of_a_linear_is_refused():
    net = Chain(fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    assert roles(net, torch.ones(2, 4, 4)) == [{"linear": "fc"}]
    assert "normalizes axis 1" in reasons(net, torch.ones(2, 4, 4))["bn"]


def test_an_activation_with_a_second_reader_still_matches_its_producer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return self.act(y) + y

    assert roles(Net(), image()) == [{"conv": "conv"}]


def test_identity_between_conv_and_norm_is_no_obstacle():
    net = Chain(conv=nn.Conv2d(3, 4, 3), same=nn.Identity(), bn=nn.BatchNorm2d(4))
    assert roles(net, image()) == [{"conv": "conv", "bn": "bn"}]


@pytest.mark.parametrize("between", [nn.Dropout(0.3), DropPath()])
def test_what_acts_in_training_between_conv_and_norm_prevents_the_match(between):
    net = Chain(conv=nn.Conv2d(3, 4, 3), between=between, bn=nn.BatchNorm2d(4))
    assert roles(net, image()) == [{"conv": "conv"}]


def test_norm_before_conv_is_no_pattern():
    assert roles(NormBeforeConv(), image()) == [{"conv": "conv"}]
    assert reasons(NormBeforeConv(), image()) == {}


def test_parallel_branches_match_one_by_one():
    assert roles(ParallelBranches(), image(4)) == [{"conv": "conv3", "bn": "bn3"}, {"conv": "conv1", "bn": "bn1"}]


def test_sync_batch_norm_matches():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    assert roles(net, image()) == [{"conv": "conv", "bn": "bn"}]


def test_names_inside_data_parallel_are_those_of_the_wrapped_model():
    net = nn.DataParallel(Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    assert roles(net, image()) == [{"conv": "module.conv", "bn": "module.bn"}]


def hooked() -> nn.Module:
    net = Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    net.conv.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    "net, site, words",
    [
        (
            Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4, track_running_stats=False)),
            "bn",
            "no running statistics",
        ),
        (OneConvTwoNorms(), "bn1", r"conv feeds 2 batch norms \(bn1, bn2\)"),
        (OneConvTwoNorms(), "bn2", r"conv feeds 2 batch norms \(bn1, bn2\)"),
        (OneNormTwoConvs(), "bn", "called 2 times"),
        (ConvIsAlsoOutput(), "bn", r"the output of conv has 2 readers \(bn, the output of the model\)"),
        (hooked(), "bn", "conv has forward hooks"),
        (FlatOpaque(), "bn", "what feeds it is not known: the graph was read by walk"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_fold_is_refused_and_the_conv_still_matches_alone(net, site, words):
    conv = "a" if isinstance(net, OneNormTwoConvs) else "conv"
    assert roles(net, image())[0] == {"conv": conv}
    assert re.search(words, reasons(net, image())[site])


@pytest.mark.parametrize(
    "net, channels, site, words",
    [
        (ConvCalledTwice(), 4, "conv", "called 2 times in one forward pass"),
        (TiedConvs(), 3, "a", "weight is tied to b.weight"),
        (TiedConvs(), 3, "b", "weight is tied to a.weight"),
        (WeightReadElsewhere(), 3, "conv", "parameters are also read by aten.*norm.* in the root"),
        (
            nn.Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4)),
            3,
            "0",
            "has a forward of its own",
        ),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), 3, "0", "ConvTranspose2d is not supported"),
        (nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), 3, "0", "weight is re-parametrized"),
        (nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3))), 3, "0", "weight is computed by a hook"),
        (Functional(), 3, "w1", "functional conv2d on a parameter; .*modularize"),
        (nn.Conv2d(3, 4, 3), 3, "", "the model itself is the layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_layer_is_refused(net, channels, site, words):
    assert re.search(words, reasons(net, image(channels))[site])
    assert all(site not in found_roles.values() for found_roles in roles(net, image(channels)))


def test_norms_inside_torch_layers_do_not_hide_their_linears():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    why = reasons(attention, *[torch.ones(2, 3, 8)] * 3)
    assert "used inside MultiheadAttention" in why["in_proj_weight"] and "used inside" in why["out_proj"]


def test_a_layer_that_does_not_run_is_refused():
    net = Chain(conv=nn.Conv2d(3, 4, 3))
    net.conv.aux = nn.Linear(2, 2)
    assert reasons(net, image())["conv.aux"] == "did not run on the example inputs in eval mode"


def test_a_product_with_a_parameter_is_reported():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return torch.addmm(x.new_zeros(4), x, self.weight)

    assert "Product multiplies by its parameter" in reasons(nn.Sequential(Product()), torch.ones(2, 4))["0.weight"]


def test_a_fixed_filter_is_no_site():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.ones(3, 1, 2, 2))

        def forward(self, x):
            return F.conv2d(x, self.kernel * 0.25, groups=3)

    assert found(Blur(), image()) == ([], [])


def test_a_norm_with_an_activation_inside_names_what_stays_of_it():
    net = Chain(conv=nn.Conv2d(3, 4, 3), bn=NormAct(4))
    (kept,) = match(capture(net, image()), net)[0]
    assert kept.roles == {"conv": "conv", "bn": "bn", "act": "bn.act"} and kept.norm_children == ("bn.act",)


class Joins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.bn(self.a(x))
        y += self.b(x)
        y = F.relu(y) + 1
        return torch.cat([self.act(x), self.act(y), x.exp()], 1) + x.repeat(1, 3, 1, 1)


def test_residual_add_names_what_produces_its_operands():
    joins = [m for m in found(Joins(), image())[0] if m.pattern in ("add", "cat")]
    assert [(m.pattern, m.operands, m.roles) for m in joins] == [("add", ("bn", "b"), {"act": "F.relu"})]


def test_a_concatenation_of_modules_outputs():
    net = Joins()
    net.forward = lambda x: torch.cat([net.a(x), net.b(x), x], 1)
    joins = [m for m in found(net, image())[0] if m.pattern == "cat"]
    assert [m.operands for m in joins] == [("a", "b", None)]


def test_an_add_of_a_concatenation_reads_what_went_into_it():
    net = Joins()
    order = torch.arange(6).flip(0)
    net.forward = lambda x: torch.cat([net.a(x), net.b(x)], 1).index_select(1, order) + net.act(x.repeat(1, 2, 1, 1))
    joins = [m for m in found(net, image())[0] if m.pattern == "add"]
    assert [m.operands for m in joins] == [("a", "b", "act")]


@pytest.mark.parametrize("net", [Opaque(), FlatOpaque(), UnknownToExport(), TiedConvs(), ParallelBranches()])
def test_every_layer_is_in_one_match_or_one_refusal(net):
    matches, refusals = found(net, image(4 if isinstance(net, ParallelBranches) else 3))
    sites = [m.roles.get("conv") or m.roles.get("linear") for m in matches] + [r.site for r in refusals]
    counted = Counter(site for site in sites if site)
    assert all(counted[name] == 1 for name, module in net.named_modules() if isinstance(module, SITES))
