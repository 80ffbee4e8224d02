"""One call that says which layers mind few bits, and one that shows what compression did."""

from __future__ import annotations

import ast
import copy
import math

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SLB, Prune, SimQAT, quantize_weights
from gs_algos.analysis.compare import compare


class Net(nn.Module):
    """A network in which the last layer minds rounding more than all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        x = self.norm_a(self.a(x)).relu()
        x = self.norm_b(self.b(x)).relu() + x
        return self.fc(x.mean((2, 3)))


def data(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(6, (16,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for x, _ in data():
            net(x)
        net.fc.weight.mul_(40)
    return net.eval()


def rules_of(advice):
    return ast.literal_eval(advice.rules.removeprefix("rules="))


def test_the_layers_that_mind_most_are_raised_and_the_rules_work(net):
    found = gs_algos.analyze(net, data()[0][0], data(), choices=("int2@channel", "int8@channel"), tolerance=0.05)
    (advice,) = found.advice
    assert advice.text.startswith("Give 1 of 3 layers") or advice.text.startswith("Give 2 of 3 layers")
    assert any(pattern == "fc" or "fc" in pattern for pattern, _ in rules_of(advice))
    assert advice.predicted.divergence <= 0.05 and advice.predicted.samples == advice.measured.samples == 32
    ruled = quantize_weights(copy.deepcopy(net), "int4@channel", rules=rules_of(advice), progress=False)
    assert ruled.fc.bits == 8


def test_what_is_measured_is_what_the_packed_network_does(net):
    found = gs_algos.analyze(net, data()[0][0], data(), choices=("int4@channel", "int8@channel"), tolerance=0.001)
    (advice,) = found.advice
    packed = quantize_weights(copy.deepcopy(net), "int4@channel", rules=rules_of(advice), progress=False)
    x = torch.cat([x for x, _ in data()])[32:]
    with torch.no_grad():
        p, q = net(x), packed(x)
    divergence = float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())
    assert advice.measured.divergence == pytest.approx(divergence, rel=0.02)
    assert advice.measured.error == pytest.approx(float((q - p).norm() / p.norm()), rel=0.02)


def test_nothing_is_advised_where_the_divergence_is_small_enough(net):
    assert (
        gs_algos.analyze(net, data()[0][0], data(), choices=("int4@channel", "int8@channel"), tolerance=9).advice == ()
    )


def test_the_network_is_as_it_was(net):
    net.train()
    before = copy.deepcopy(net.state_dict())
    gs_algos.analyze(net, data()[0][0], data())
    assert net.training and all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_without_other_data_the_inputs_serve_and_it_is_said(net):
    found = gs_algos.analyze(net, data()[0][0][:1], choices=("int2@channel", "int8@channel"))
    assert any("no other samples" in note for note in found.notes)


def test_a_report_has_every_part_and_its_sums_agree(net, tmp_path):
    x = data()[0][0]
    algo = SimQAT(weight="int2@channel", act="int8@tensor")
    new = algo.apply(copy.deepcopy(net), x)
    algo.calibrate(new, [x])
    new = algo.convert(new, x)
    found = gs_algos.report(net, new, data(), tmp_path / "page.html", seconds=0.0)
    assert found.effect.before.quality.name == "accuracy" and found.effect.samples == 64
    assert str(found.comparison) == str(compare(net, new, [x[:8], x[8:], data()[1][0][:8], data()[1][0][8:]]))
    assert [one.batch for one in found.times] == [8, 8] and found.history[0]["algorithm"] == "simqat"
    assert found.advice and "int8@channel" in found.advice[0].rules
    page = (tmp_path / "page.html").read_text()
    assert "<h1" in page and "norm_a" not in [one.site for one in found.comparison.layers]
    held = sum(one.nbytes for one in found.comparison.layers)
    rest = sum(t.numel() * t.element_size() for k, t in new.state_dict().items() if k.split(".")[0] not in "abfc")
    assert held + rest <= found.effect.after.disk_bytes < held + rest + 20_000


@pytest.mark.parametrize("kind", ["slb", "prune", "weights"])
def test_every_algorithm_has_a_report(net, kind):
    x, new = data()[0][0], copy.deepcopy(net)
    if kind == "weights":
        new = quantize_weights(new, "int4@channel", progress=False)
    else:
        algo = SLB(weight="2bit@channel", total_steps=10) if kind == "slb" else Prune(rate=0.5)
        new = algo.convert(algo.apply(new, x), x)
    found = gs_algos.report(net, new, data(2), seconds=0.0)
    assert found.effect.after.disk_bytes < found.effect.before.disk_bytes
    assert bool(found.channels) == (kind == "prune") and "<h1" in found.html()
    if kind == "prune":
        assert found.channels["a"] == (8, 4)


def test_clipped_inputs_and_one_scale_for_unequal_channels_are_found(net):
    x = data()[0][0]
    with torch.no_grad():
        net.b.weight[0] *= 30
        net.norm_b.weight[0] /= 30
    algo = SimQAT(weight="int4@tensor", act="int8@tensor")
    new = algo.apply(copy.deepcopy(net), x)
    algo.calibrate(new, [x])
    new = algo.convert(new, x)
    assert "[('b', {'weight': 'int4@channel" in _advice(net, new)
    new.fc.input_quantizer.scale.mul_(0.2)
    assert "[('fc', {'act': 'int8@tensor:minmax'})]" in _advice(net, new)


def _advice(before, after):
    found = gs_algos.report(before, after, data(), seconds=0.0, tolerance=9)
    return "\n".join(map(str, found.advice))


def test_language_models_are_measured_by_perplexity(net):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    ).eval()
    windows = [{"input_ids": torch.randint(64, (1, 32))} for _ in range(4)]
    new = quantize_weights(copy.deepcopy(model), "int4@group:32", progress=False)
    found = gs_algos.report(model, new, windows, seconds=0.0)
    assert found.effect.before.quality.name == "perplexity" and math.isfinite(found.effect.divergence)
    assert len(found.comparison.layers) == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: gs_algos.report(net, net, []), "report: at least one batch"),
        (lambda net: gs_algos.report(net, nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), data(1)), "none in common"),
        (lambda net: gs_algos.analyze(net, data()[0][0], samples=0), "samples must be at least 1"),
        (lambda net: gs_algos.analyze(net, data()[0][0], choices=("int4@channle",)), "int4@channle"),
        (lambda net: gs_algos.analyze(net, data()[0][0], tolerance=math.nan), "tolerance must be 0 nats or more"),
        (lambda net: gs_algos.report(net, net, data(1), tolerance=-1), "tolerance must be 0 nats or more"),
        (
            lambda net: gs_algos.analyze(net, data()[0][0], choices=("int8@channel", "int2@channel")),
            "must end with the most bits",
        ),
    ],
)
def test_wrong_input_is_refused(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)


def test_a_page_that_cannot_be_written_is_refused(net, tmp_path):
    with pytest.raises(ValueError, match="must be a file, got the folder"):
        gs_algos.report(net, copy.deepcopy(net), data(1), tmp_path, seconds=0.0)
