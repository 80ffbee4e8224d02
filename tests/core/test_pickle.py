"""Networks in every state go through pickle, copies and torch.save: spawned processes and averaged copies need it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SCOP, SLB, Prune, SimQAT, SlbSGD, UniPrune, quantize_weights
from gs_algos.core.algorithm import Algorithm, history
from gs_algos.fx.modularize.functional_calls import Modularized
from gs_algos.pruning.channel_gates import Freezer
from tests.nets.convolutional import SmallConvNet, images, mlp


class ByHand(nn.Module):
    """Its layers are functional calls, and its annotations text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(3, 1, 3, 3))
        self.fc = nn.Parameter(torch.randn(4, 3))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.dropout(F.relu(F.conv2d(x, self.conv)), 0.4, self.training)
        return F.linear((y if mask is None else y * mask).mean((2, 3)), self.fc)


def by_torch_save(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch_save,
}
STATES: dict[str, tuple[Callable[[], Algorithm], Callable[[], nn.Module], int]] = {
    "simqat": (SimQAT, SmallConvNet, 2),
    "simqat, functional": (SimQAT, ByHand, 2),
    "slb": (lambda: SLB(weight="2bit@channel", total_steps=2), SmallConvNet, 2),
    "slb, fused": (lambda: SLB(weight="1bit@channel", total_steps=2, fused=True), SmallConvNet, 2),
    "prune": (lambda: Prune(rate=0.4), SmallConvNet, 2),
    "taylor": (lambda: Prune(rate=0.4, importance="taylor", select_steps=2), SmallConvNet, 2),
    "uniprune": (lambda: UniPrune(rate=0.4, round_to=2, select_steps=2, every=1), SmallConvNet, 2),
    "scop": (lambda: SCOP(rate=0.4, select_steps=2), SmallConvNet, 2),
    "scop, given": (lambda: SCOP(rate=0.4, select_steps=2, knockoffs=[images(seed=9)]), SmallConvNet, 2),
}


def prepared(make: Callable[[], Algorithm], build: Callable[[], nn.Module]) -> tuple[nn.Module, Algorithm]:
    """A network with its algorithm; fused layers have an optimizer, without which no step is taken."""
    torch.manual_seed(0)
    algo = make()
    net = algo.apply(build(), images())
    if isinstance(algo, SLB) and algo.fused_layers():
        SlbSGD(algo.fused_layers(), lr=0.1)
    return net, algo


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(images())


def learn(net: nn.Module, algo: Algorithm) -> None:
    net.train()(images()).square().mean().backward()
    for parameter in net.parameters():
        parameter.grad = None
    algo.step()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_prepared_and_converted_networks_are_copied_twice_and_stay_what_they_are(state, copied):
    make, build, steps = state
    net, algo = prepared(make, build)
    for stage in ("prepared", "converted"):
        if stage == "converted":
            for _ in range(steps):
                learn(net, algo)
            net = algo.convert(net, images())
        other = copied(copied(net))
        assert torch.equal(outputs(other), outputs(net)) and history(other) == history(net)
        assert list(other.state_dict()) == list(net.state_dict())
        assert [type(m).__qualname__ for m in other.modules()] == [type(m).__qualname__ for m in net.modules()]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_training_goes_on_in_another_process_as_it_would_have_here(state):
    make, build, steps = state
    net, algo = prepared(make, build)
    there, algo_there = pickle.loads(pickle.dumps((net, algo)))
    for each, its in ((net, algo), (there, algo_there)):
        torch.manual_seed(1)
        for _ in range(steps):
            learn(each, its)
    assert torch.equal(outputs(algo_there.convert(there, images())), outputs(algo.convert(net, images())))


def test_a_pickled_network_is_resumed_without_its_algorithm():
    net = pickle.loads(pickle.dumps(SCOP(rate=0.4, select_steps=2).apply(SmallConvNet(), images())))
    algo = SCOP.resume(net)
    hooks = [hook for hook in net._forward_pre_hooks.values() if isinstance(hook.__self__, Freezer)]
    assert len(hooks) == 1
    for _ in range(2):
        learn(net, algo)
    assert algo.convert(net, images()) is net


def test_an_iterator_of_knock_offs_stays_with_its_process():
    algo = SCOP(rate=0.4, select_steps=2, knockoffs=(images() for _ in range(9)))
    net = pickle.loads(pickle.dumps(algo.apply(SmallConvNet(), images())))
    outputs(net)
    with pytest.raises(ValueError, match="SCOP: knockoffs must give at least one batch, got none"):
        net.train()(images())


def test_a_functional_network_keeps_hooks_and_unused_parameters_in_a_pickle():
    net = SimQAT().apply(ByHand(), images())
    net.register_forward_hook(doubled)
    other = pickle.loads(pickle.dumps(net))
    assert isinstance(other, Modularized) and "idle" in other.state_dict()
    assert torch.equal(outputs(other), outputs(net)) and list(other._forward_hooks.values()) == [doubled]
    SimQAT().apply(ByHand(), images())  # a pickle leaves the tracer as it was


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_packed_networks_are_copied(copied):
    net = quantize_weights(mlp(), "int4@group:8", progress=False)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copied(copied(net))(x), net(x))
