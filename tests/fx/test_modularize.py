"""Functional networks get layers that share their Parameters: same outputs, same training, same state_dict."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gs_algos.fx.modularize.functional_calls import modularize
from gs_algos.fx.modularize.shared_parameters import Borrowed
from tests.nets.graphs import Functional, FunctionalMLP, fork, image, roles


def vector() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    net.train()
    optimizer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        loss = net(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


CASES = [(Functional, image), (FunctionalMLP, vector)]


@pytest.mark.parametrize("kind, inputs", CASES)
def test_functional_calls_become_layers(kind, inputs):
    net, x = kind().eval(), inputs()
    want = net(x)
    new = modularize(net, x)
    assert torch.equal(new(x), want)
    assert len(roles(new, x)) == 2 and sum(isinstance(module, Borrowed) for module in new.modules()) == 2


@pytest.mark.parametrize("kind, inputs", CASES)
def test_parameters_and_keys_are_the_same(kind, inputs):
    net = kind()
    before, keys = list(net.named_parameters()), list(net.state_dict())
    new = modularize(net, inputs())
    after = list(new.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert list(new.state_dict()) == keys
    kind().load_state_dict(new.state_dict())
    new.load_state_dict(kind().state_dict())


@pytest.mark.parametrize("kind, inputs", CASES)
def test_an_optimizer_made_before_trains_the_layers(kind, inputs):
    net, twin, x = kind(), kind(), inputs()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    new = modularize(net, x)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        assert torch.equal(one_step(new, optimizer, x), one_step(twin, reference, x))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), twin.parameters(), strict=True))


def test_dropout_follows_the_mode():
    new, x = modularize(Functional(), image()), image()
    new.train()
    assert not torch.equal(new(x), new(x))
    new.eval()
    assert torch.equal(new(x), new(x))


def test_sharing_survives_deepcopy_casts_and_reload():
    new = modularize(Functional(), image())
    twin = copy.deepcopy(new).double()
    assert twin.w1 is twin.w1_conv2d.weight and twin.w1 is not new.w1 and twin.w1.dtype == torch.float64
    assert list(twin.state_dict()) == list(new.state_dict())
    buffer = io.BytesIO()
    torch.save(new.state_dict(), buffer)
    buffer.seek(0)
    twin.float().load_state_dict(torch.load(buffer))
    x = image()
    assert torch.equal(twin.eval()(x), new.eval()(x))


def test_a_missing_key_is_reported_under_its_float_name():
    new = modularize(Functional(), image())
    state = {key: value for key, value in new.state_dict().items() if key != "w1"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"w1"'):
        new.load_state_dict(state)


def test_an_inner_module_is_rewritten_in_place():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Functional()).eval()
    want, keys, conv = net(image()), list(net.state_dict()), net[0]
    new = modularize(net, image())
    assert new is net and net[0] is conv and isinstance(net[1], torch.fx.GraphModule)
    assert torch.equal(net(image()), want) and list(net.state_dict()) == keys


def test_a_model_without_functional_layers_is_returned_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert modularize(net, image()) is net and type(net) is nn.Sequential


def test_a_weight_used_twice_becomes_one_layer_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(6))

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.w)), self.w)

    new = modularize(Net(), vector())
    assert sum(isinstance(module, Borrowed) for module in new.modules()) == 1
    assert roles(new, vector()) == []


class Branching(FunctionalMLP):
    def forward(self, x):
        return fork(super().forward(x))


class OtherPathInTraining(FunctionalMLP):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.training else y


class ComputedWeight(FunctionalMLP):
    def forward(self, x):
        return F.linear(x, self.w1 * 2) + F.linear(x, self.w1, self.b1 * 2)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Branching, "stays functional: symbolically traced variables cannot be used as inputs to control flow"),
        (OtherPathInTraining, "stays functional: its forward takes another path in training than in eval mode"),
        (ComputedWeight, "stays functional: none of its functional calls has a parameter as weight"),
    ],
)
def test_what_cannot_be_traced_stays_and_says_why(kind, reason, caplog):
    net = kind()
    with caplog.at_level(logging.WARNING):
        assert modularize(net, vector()) is net
    assert reason in caplog.text and net.training


def test_an_argument_left_at_its_default_keeps_its_name():
    new = modularize(Functional(), image()).eval()
    assert torch.equal(new(x=image(), mask=None), new(image()))
    with pytest.raises(AssertionError, match="mask has been specialized"):
        new(image(), torch.ones(1))
