"""Passes of a block repeat what earlier ones computed, and give the same codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gs_algos.ptq import block_loop
from gs_algos.ptq.blocks import Block as Named
from gs_algos.ptq.replay import Replay
from gs_algos.ptq.streams import ActivationStore
from tests.ptq.test_ptq import batches, calibrated


class Mixer(nn.Module):
    """Has two layers one behind the other, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.runs = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x):
        self.runs += 1
        return self.b(torch.tanh(self.a(x)))


class Writing(nn.Module):
    """Writes into what its mixer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.up, self.down = Mixer(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.mixer(x)
        y += x
        return self.down(torch.relu(self.up(y))) + y


class Reading(Writing):
    def forward(self, x):
        y = self.mixer(x) + x
        return self.down(torch.relu(self.up(y))) + y


def net(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(3))).eval()


def without_replay(monkeypatch):
    monkeypatch.setattr(block_loop, "Replay", lambda model, block, layers, store: Replay(model, block, (), store))


@pytest.mark.parametrize(
    "options", [{}, {"blocks": "none"}, {"act": "int8@token"}, {"rounding": "signround", "steps": 2}]
)
@pytest.mark.parametrize("block", [Reading, Writing])
def test_codes_are_those_of_whole_passes(block, options, monkeypatch):
    got = calibrated(net(block), batches(), **options)[1].state_dict()
    without_replay(monkeypatch)
    for key, want in calibrated(net(block), batches(), **options)[1].state_dict().items():
        torch.testing.assert_close(got[key], want, rtol=0, atol=0)


def test_what_is_rounded_runs_once_in_the_passes_behind_it(monkeypatch):
    _, model = calibrated(net(Reading), batches())
    without_replay(monkeypatch)
    _, whole = calibrated(net(Reading), batches())
    # each of 6 batches: no more in the pass of the last layer, and behind the block
    assert [one.mixer.runs - other.mixer.runs for one, other in zip(whole, model, strict=True)] == [2 * 6] * 3


def test_without_room_nothing_is_kept_and_the_codes_are_the_same():
    algo, model = calibrated(net(Reading), batches(), budget=0)
    want = calibrated(net(Reading), batches())[1]
    for key, value in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    assert algo.report.in_memory == 0 and model[0].mixer.runs > want[0].mixer.runs


def test_modules_with_forward_hooks_run_each_time_and_keep_their_class():
    model, seen = net(Reading), []
    model[0].mixer.register_forward_hook(lambda module, args, y: seen.append(type(module)) or 2 * y)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.solved = True
    with ActivationStore(2**20) as store, torch.no_grad():
        replay, x = Replay(model, Named(("0",)), layers, store), batches()[0]
        want = model[0](x)
        for _ in range(3):
            with replay.running(0):
                assert torch.equal(model[0](x), want)
        assert store.held > 0 and seen == [Mixer] * 4 and type(model[0].up) is nn.Linear
        replay.clear()
        assert store.held == 0


class Attending(nn.Module):
    """Is a block with attention twice: in a mixer of its own, and between its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.query, self.out = Attention(), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x + self.mixer(x)
        return y + self.out(attend(torch.tanh(self.query(y))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(attend(self.a(x)))


def attend(x):
    return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]


class Counted(TorchFunctionMode):
    """Counts the products of attention that are computed."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_attention_behind_rounded_layers_is_computed_once_for_each_batch(monkeypatch):
    with Counted() as counted:
        model = calibrated(net(Attending), batches())[1]
    without_replay(monkeypatch)
    with Counted() as each_time:
        want = calibrated(net(Attending), batches())[1].state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=0)
    # in each of 3 blocks, for each of 6 batches: the mixer's in the passes of b, query and out and behind the block,
    # the other one in that of out and behind the block
    assert each_time.calls - counted.calls == 3 * 6 * (3 + 1)
