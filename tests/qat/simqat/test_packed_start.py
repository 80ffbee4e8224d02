"""A training begins at the very values of packed weights, or is refused and changes nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from gs_algos import Distill, SimQAT, quantize_weights

HEAD = [("head", None)]


def make_net(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    parts = {"body": nn.Linear(64, width), "act": nn.ReLU(), "tail": nn.Linear(width, 64), "head": nn.Linear(64, 5)}
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


def packed_by(weight: str, net: nn.Module) -> nn.Module:
    return quantize_weights(copy.deepcopy(net), weight, rules=HEAD)


@pytest.mark.parametrize(
    "packed, trained",
    [
        ("int2@group:32", "int2@group:32:asym:lsq"),
        ("int4@channel:mse", "int4@channel:asym:lsq"),
        ("int4@group:32:asym", "int4@group:32:asym:lsq"),
        ("uint4@group:32:asym", "int4@group:32:asym:lsq"),
        ("int4@group:32", "uint4@group:32:asym:lsq"),
        ("int8@channel", "int8@channel:lsq"),
    ],
)
def test_it_begins_at_the_packed_values(packed, trained, x):
    net = make_net()
    theirs = packed_by(packed, net)
    with torch.no_grad():
        theirs.head.bias.add_(1)  # other tensors are taken over too
    before = {name: t.clone() for name, t in theirs.state_dict().items()}
    algo = SimQAT(weight=trained, act=None, rules=HEAD)
    net = algo.apply(net, x)
    algo.start_from(theirs)
    net.eval()
    wanted = theirs(x)
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
    for name in ("body", "tail"):
        assert torch.equal(net.get_submodule(name).weight, theirs.get_submodule(name).weight)
    assert all(quantizer.scale.min() > 0 for quantizer in (net.body.weight_quantizer, net.tail.weight_quantizer))
    assert all(torch.equal(t, before[name]) for name, t in theirs.state_dict().items())
    net = algo.convert(net)
    assert net.body.bits == theirs.body.bits
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_distillation_begins_there_and_trains_on(x):
    net = make_net()
    theirs, teacher = packed_by("int2@group:32", net), copy.deepcopy(net)
    algo = Distill(SimQAT(weight="int2@group:32:asym:lsq", act=None, rules=HEAD), teacher, labels=0.0)
    net = algo.apply(net, x)
    algo.start_from(theirs)
    optimizer, loss_fn, losses = torch.optim.Adam(net.parameters(), lr=1e-3), algo.loss(nn.functional.cross_entropy), []
    for _ in range(30):
        loss = loss_fn(net(x), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(RuntimeError, match="start_from: it must come before training, got 30 steps"):
        algo.start_from(theirs)


@pytest.mark.parametrize(
    "packed, trained, width, message",
    [
        ("int4@group:32", "int4@group:32", 64, "steps must be learned, got int4@group:32.* at body"),
        ("int2@group:32", "int2@group:32:lsq", 64, "must hold the packed values of body.*scales of both signs.*:asym"),
        ("int4@group:32:asym", "int2@group:32:lsq:asym", 64, "must hold the packed values of body, got 4 bits"),
        ("mxfp4", "int4@group:32:lsq:asym", 64, "got 4 bits with a table of levels"),
        ("int4@group:16", "int4@group:32:lsq:asym", 64, "128 scales, as int4@group:32.* got .* with 256"),
        ("int4@group:32", "int4@group:32:lsq:asym", 32, "body must have weights .64, 64."),
    ],
)
def test_what_cannot_be_held_is_refused(packed, trained, width, message, x):
    algo = SimQAT(weight=trained, act=None, rules=HEAD)
    net = algo.apply(make_net(), x)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"SimQAT.start_from: .*{message}"):
        algo.start_from(packed_by(packed, make_net(width)))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_networks_of_other_layers_or_tensors_are_refused(x):
    algo = SimQAT(weight="int4@group:32:asym:lsq", act=None, rules=HEAD)
    with pytest.raises(RuntimeError, match="start_from"):
        algo.start_from(packed_by("int4@group:32", make_net()))
    net = algo.apply(make_net(), x)
    with pytest.raises(ValueError, match="only packed: none; only quantized: body, tail"):
        algo.start_from(make_net())
    with pytest.raises(ValueError, match="only packed: head; only quantized: none"):
        algo.start_from(quantize_weights(make_net(), "int4@group:32"))
    theirs = packed_by("int4@group:32", make_net())
    theirs.head = nn.Linear(64, 6)
    with pytest.raises(ValueError, match=r"head.weight must be \[5, 64\], got \[6, 64\]"):
        algo.start_from(theirs)
    theirs.head = nn.Linear(64, 5, bias=False)
    with pytest.raises(ValueError, match=r"only here: head\.bias; only there: none"):
        algo.start_from(theirs)
    assert net.head.bias is not None
