"""Knobs that are set on a private copy, and runs of the part of a network that lies behind one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gs_algos import quantize_weights
from gs_algos.analysis import partial_run
from gs_algos.analysis.divergence import Trials
from gs_algos.analysis.partial_run import PartialRun
from gs_algos.analysis.probe import Policy, Probe
from gs_algos.analysis.sensitivity import sensitivity


class Net(nn.Module):
    """Activations in place, a residual, a layer that is called twice, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        y = self.relu(self.b(x))
        y = self.c(self.c(y)) + x
        return self.fc(y.mean((2, 3))), y


class WritesIntoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.a(x)
        y += self.b(y)
        return y


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.a(x)
        return self.b(y if float(y.sum()) > 0 else -y)


SITES = ("a", "b", "c", "fc")
SCHEMES = ("int2@channel:minmax:sym", "int4@channel:minmax:sym", "int8@channel:minmax:sym")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    return list(torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_a_probe_rounds_as_quantize_weights_does_and_leaves_the_network(net, batches):
    before = copy.deepcopy(net.state_dict())
    probe = Probe(net, "t")
    packed = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    with torch.no_grad():
        plain = probe.network(batches[0])[0]
        with probe.set(Policy(dict.fromkeys(SITES, "int4@channel"))):
            assert torch.equal(probe.layer("b").weight, packed.b.weight.float())
            torch.testing.assert_close(probe.network(batches[0])[0], packed(batches[0])[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(probe.network(batches[0])[0], plain)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_an_error_inside_puts_the_weights_back(net):
    probe = Probe(net, "t")
    with pytest.raises(KeyError), probe.set(Policy({"a": "int2@channel"})):
        raise KeyError
    assert torch.equal(probe.layer("a").weight, net.a.weight)


def test_inputs_are_rounded_on_the_range_that_was_found(net, batches):
    probe = Probe(net, "t")
    probe.find_ranges(batches, ["b"])
    seen = []
    probe.layer("b").register_forward_hook(lambda m, args, y: seen.append(args[0]))
    with torch.no_grad(), probe.set(Policy({}, {"b": "int4@tensor", "c": "int4@tensor"})):
        probe.network(batches[0])
    rounded = seen[-1]
    with torch.no_grad():
        probe.network(batches[0])
    assert rounded.unique().numel() <= 16 < seen[-1].unique().numel()
    assert float((rounded - seen[-1]).abs().max()) < float(seen[-1].max()) / 13


@pytest.mark.parametrize("make", [Net, WritesIntoInput, Branches])
def test_partial_runs_give_the_bits_of_whole_runs(make):
    torch.manual_seed(0)
    net = make().eval()
    x = torch.randn(4, 3, 8, 8) if make is Net else torch.randn(4, 6)
    probe = Probe(net, "t")
    runs = PartialRun(probe.network, "t")
    sites = [name for name in SITES if hasattr(net, name)]
    with torch.no_grad():
        assert all(map(torch.equal, _tensors(runs.start(x)), _tensors(net(x))))
        for site in (*sites, *sites):
            with probe.set(Policy({site: SCHEMES[0]})):
                assert all(map(torch.equal, _tensors(runs.behind(site)), _tensors(probe.network(x))))
        assert all(map(torch.equal, _tensors(runs.behind(sites[0])), _tensors(net(x))))


def test_only_what_lies_behind_a_layer_runs_again(net, batches):
    probe = Probe(net, "t")
    runs, calls = PartialRun(probe.network, "t"), []
    for name in SITES:
        probe.layer(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    runs.start(batches[0])
    calls.clear()
    runs.behind("c")
    assert runs.partial and calls == ["c", "c", "fc"]


def test_values_that_take_too_much_memory_are_not_kept(net, batches, monkeypatch):
    monkeypatch.setattr(partial_run, "KEPT_BYTES", 100)
    runs = PartialRun(net, "t")
    runs.start(batches[0])
    assert not runs.partial and torch.equal(runs.behind("c")[0], net(batches[0])[0])


def test_kl_is_the_divergence_of_the_rounded_network(net, batches):
    found = sensitivity(net, batches, {"b": SCHEMES, "fc": SCHEMES}, by="kl")
    rounded = copy.deepcopy(net)
    rounded.fc = quantize_weights(nn.Sequential(copy.deepcopy(net.fc)), SCHEMES[0], progress=False)[0]
    with torch.no_grad():
        p, q = (F.log_softmax(torch.cat([n(x)[0] for x in batches]).float(), -1) for n in (net, rounded))
    assert found.scores["fc"][SCHEMES[0]] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.samples == 12 and found.by == "kl"
    assert found.scores["b"][SCHEMES[0]] > found.scores["b"][SCHEMES[1]] > found.scores["b"][SCHEMES[2]] > 0


def test_nsr_is_the_noise_of_the_layer_alone(net, batches):
    found = sensitivity(net, batches, {"fc": SCHEMES}, by="nsr")
    with torch.no_grad():
        x = torch.cat([net(part)[1].mean((2, 3)) for part in batches])
        packed = quantize_weights(nn.Sequential(copy.deepcopy(net.fc)), SCHEMES[0], progress=False)[0]
        want, got = net.fc(x), packed(x)
    expected = float((got - want).square().sum() / want.square().sum())
    assert found.scores["fc"][SCHEMES[0]] == pytest.approx(expected, rel=1e-4)


def test_many_layers_are_predicted_and_few_are_run(net, batches, monkeypatch):
    assert sensitivity(net, batches).by == "kl"
    monkeypatch.setattr("gs_algos.analysis.sensitivity.MOST_RUN", 3)
    found = sensitivity(net, batches)
    assert found.by == "gradient" and set(found.scores) == set(SITES)


def test_schemes_that_do_not_fit_a_layer_are_no_choice_there(net, batches):
    found = sensitivity(net, batches, ("int4@group:8", "int8@channel"), by="nsr")
    assert len(found.scores["b"]) == 2 and len(found.scores["a"]) == 1  # rows of 72 and of 27 weights
    with pytest.raises(ValueError, match="at least one linear or convolution must fit a scheme"):
        sensitivity(net, batches, ("int4@group:512",))


def test_outputs_that_are_no_logits_are_compared_by_squares():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 1)), torch.randn(8, 6)
    found = sensitivity(net, [x], {"0": ["int4@channel:minmax:sym"]}, by="kl")
    packed = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    with torch.no_grad():
        expected = float((packed(x) - net(x)).square().sum() / net(x).square().sum())
    assert found.scores["0"]["int4@channel:minmax:sym"] == pytest.approx(expected, rel=1e-4)


def test_a_policy_is_measured_with_all_of_its_weights_rounded(net, batches):
    probe = Probe(net, "t")
    found = Trials(probe, batches)(Policy(dict.fromkeys(SITES, "int4@channel")))
    packed = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    with torch.no_grad():
        p, q = (torch.cat([n(x)[0] for x in batches]) for n in (net, packed))
    divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert found.divergence == pytest.approx(float(divergence), rel=1e-2) and found.samples == 12
    assert found.error == pytest.approx(float((q - p).square().sum().sqrt() / p.square().sum().sqrt()), rel=1e-3)
    assert Trials(probe, batches).compared(packed).error == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "hessian"}, "by must be one of kl, gradient, nsr or auto, got 'hessian'"),
        ({"choices": {"nowhere": SCHEMES}}, "got 'nowhere'"),
        ({"choices": ("int4@chanel",)}, "int4@chanel"),
    ],
)
def test_wrong_arguments_are_refused(net, batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(net, batches, **arguments)


@pytest.mark.parametrize("by", ["kl", "gradient"])
def test_a_network_that_gives_nan_is_refused(net, batches, by):
    net.b.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        sensitivity(net, batches, ("int4@channel",), by=by)


def _tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)
