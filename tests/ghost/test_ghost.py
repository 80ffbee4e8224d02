"""Ghost layers: which convolutions become one, what a fit leaves out, and that all that follows takes them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import Ghost, Pipeline, Prune, SimQAT
from gs_algos.core.timing import Timing
from gs_algos.ghost import planning
from gs_algos.ghost.fit import OutputMoments, error_of, fitted, moments_of_filters, write
from gs_algos.ghost.layers import GhostConv2d
from gs_algos.quant.integer import quantized_tensor
from tests.nets.convolutional import train


class Net(nn.Module):
    """Has a convolution of every kind that a plan speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.bn1 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.b = nn.Conv2d(16, 19, 1)
        self.narrow = nn.Conv2d(19, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.a(x)))
        x = self.b(self.grouped(self.depthwise(x)))
        return self.fc(self.narrow(F.relu(x)).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        for _ in range(3):
            made(images(seed))
        nn.init.uniform_(made.bn1.weight, 0.5, 1.5)
        nn.init.uniform_(made.bn1.bias)
    return made.eval()


def images(seed: int = 0, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def pair(ratio: int = 2, **options: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d, GhostConv2d]:
    """A convolution with a batch norm of random statistics, and a ghost layer for them."""
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(4, 18, 3, **options), nn.BatchNorm2d(18).eval()
    for key in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(key, 0.5, 1.5)
    return conv, norm, GhostConv2d(conv, norm, ratio, 3, ordered=True).eval()


def test_every_convolution_is_replaced_or_says_why_not():
    plan = Ghost(force=True, rules=[("a", {"ratio": 4})]).plan(net(), images())
    assert [(row.site, row.settings.ratio) for row in plan.acted()] == [("a", 4), ("b", 2)]
    reasons = {row.site: row.reason for row in plan.kept()}
    assert reasons == {
        "stem": "is the first convolution",
        "depthwise": "is depthwise: each channel follows from one already",
        "grouped": "has 2 groups, and a ghost layer computes its channels from all inputs",
        "narrow": "has 8 channels, and 16 are the least that pay",
    }
    before = {key: value.clone() for key, value in net().state_dict().items()}
    assert all(torch.equal(before[key], value) for key, value in net().state_dict().items())


def test_the_plan_has_what_a_layer_takes():
    row = next(row for row in Ghost(force=True).plan(net(), images(count=2)).rows if row.site == "a")
    pixels = 2 * 6 * 6
    assert f"{pixels * 16 * 16 * 9:,} -> {pixels * (8 * 16 * 9 + 8 * 9):,} multiply-adds" in row.detail
    assert f"{4 * (16 * 16 * 9 + 32):,} -> {4 * (8 * 16 * 9 + 8 * 9 + 32):,} bytes" in row.detail


@pytest.mark.parametrize(("ms", "acted"), [(0.5, ["a"]), (2.0, [])])
def test_a_slower_layer_stays_unless_forced(monkeypatch, ms, acted):
    monkeypatch.setattr(planning, "time_in_turns", lambda *_: [Timing(1, 1, 1, 5), Timing(ms, ms, ms, 5)])
    rules = [("b", None)]
    plan = Ghost(rules=rules).plan(net(), images())
    assert [row.site for row in plan.acted()] == acted
    forced = Ghost(force=True, rules=rules).plan(net(), images())
    assert [row.site for row in forced.acted()] == ["a"]
    if not acted:
        assert "slower" in next(row.reason for row in plan.rows if row.site == "a")
        with pytest.raises(ValueError, match="at least one convolution must be replaceable, got none"):
            Ghost(rules=rules).apply(net(), images())


def test_moments_of_outputs_are_those_of_their_definition():
    y = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = OutputMoments(2, 3)
    seen.add(y[:1].float())
    seen.add(y[1:].float())
    found = seen.moments()
    shifted = F.unfold(y, 3, padding=1).view(3, 2, 9, 20).permute(1, 2, 0, 3).reshape(2, 9, 60)
    flat = y.transpose(0, 1).reshape(2, 60)
    every = torch.cov(torch.cat([flat, shifted.flatten(0, 1)]), correction=0)
    assert torch.allclose(found.energy, every[:2, :2].diagonal(), atol=1e-6)
    assert torch.allclose(found.cross, every[:2, 2:].view(2, 2, 9).permute(2, 0, 1), atol=1e-6)
    assert torch.allclose(found.own[1], every[11:, 11:], atol=1e-6)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"stride": (1, 2), "dilation": 2, "padding": 2}])
def test_moments_of_filters_are_those_of_white_noise(options):
    conv, norm, _ = pair(**options)
    seen = OutputMoments(18, 3)
    noise = torch.randn(24, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = conv(noise)
        norm.running_mean, norm.running_var = y.mean((0, 2, 3)), y.var((0, 2, 3))
        seen.add(norm(y))
    got, want = moments_of_filters(conv, norm, 3), seen.moments()
    scale = want.energy.mean()
    for name in ("energy", "own", "cross"):
        assert float((getattr(got, name) - getattr(want, name)).abs().max() / scale) < 0.12, name
    assert torch.allclose(got.mean, want.mean, atol=0.02)


@pytest.mark.parametrize("ratio", [2, 3, 5])
@pytest.mark.parametrize("normed", [True, False])
def test_the_error_of_a_fit_is_that_of_the_layer(ratio, normed):
    conv, norm, _ = pair(padding=1)
    bn = norm if normed else None
    layer = GhostConv2d(conv, bn, ratio, 3, ordered=True).eval()
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = norm(conv(x)) if normed else conv(x)
        seen = OutputMoments(18, 3)
        seen.add(y)
        fit = fitted(seen.moments(), ratio)
        write(layer, conv, bn, fit, seen.moments())
        left = (layer(x) - y).square().sum() / (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float(left) == pytest.approx(error_of(fit, seen.moments()), rel=1e-3)
    made = (fit.ghosts >= 0).sum()
    assert made == 18 - len(fit.primary)
    assert sorted(fit.primary.tolist() + fit.ghosts[fit.ghosts >= 0].tolist()) == list(range(18))


def test_channels_that_follow_from_others_are_found_and_made_so():
    conv, _, _ = pair(padding=1)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(5))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        conv.weight[order[9:]] = -2 * conv.weight[order[:9]]
        moments = moments_of_filters(conv, None, 3)
        fit = fitted(moments, 2)
        layer = GhostConv2d(conv, None, 2, 3, ordered=True)
        write(layer, conv, None, fit, moments)
        assert torch.allclose(layer(x), conv(x), atol=1e-2)
    found = {frozenset((made, of)) for made, of in enumerate(fit.source.tolist()) if made != of}
    assert found == {frozenset(one) for one in zip(order[:9].tolist(), order[9:].tolist(), strict=True)}
    assert error_of(fit, moments) < 1e-6


def test_calibration_takes_the_fit_that_is_better_on_what_it_was_not_fitted_to():
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    before = model(images(9)).detach()
    want = net()(images(9)).detach()
    assert algo.calibrate_first
    algo.calibrate(model, [images(seed) for seed in range(8)])
    assert not algo.calibrate_first
    after = model(images(9)).detach()
    assert set(algo.errors) == {"a", "b"}
    assert all(by_outputs < by_filters for by_filters, by_outputs in algo.errors.values())
    assert float((after - want).norm()) < float((before - want).norm())
    assert "%" in algo.summary(model)


def test_what_calibration_found_is_in_the_checkpoint(tmp_path, caplog):
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    early = gs_algos.load(gs_algos.save(model, tmp_path / "early"), net)
    Ghost.resume(early)
    assert "fitted to filters alone" in caplog.text
    caplog.clear()
    algo.calibrate(model, [images(seed) for seed in range(4)])
    loaded = gs_algos.load(gs_algos.save(model, tmp_path / "fitted"), net)
    assert Ghost.resume(loaded).errors == algo.errors
    assert not caplog.text
    summary = algo.summary(model)
    assert algo.summary(gs_algos.load(gs_algos.save(algo.convert(model), tmp_path / "done"), net)) == summary


def test_calibration_that_fails_changes_nothing():
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    before = copy.deepcopy(model.state_dict())
    bad = images()
    bad[0] = float("nan")
    for batches, words in (([], "at least one batch"), ([images()[:0]], "at least one sample"), ([bad], "finite")):
        with pytest.raises(ValueError, match=words):
            algo.calibrate(model, batches)
    with pytest.raises(ValueError, match="either batches or forward_loop"):
        algo.calibrate(model)
    with pytest.raises(RuntimeError, match="must be the one that the algorithm trains"):
        algo.calibrate(net(), [images()])
    assert isinstance(model.a, GhostConv2d)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    algo.step()
    with pytest.raises(RuntimeError, match="must be kept, got a step"):
        algo.calibrate(model, [images()])


def test_without_a_fit_the_layers_start_at_random_and_need_no_order():
    model, other = net(), net()
    for seed, one in enumerate((model, other)):
        torch.manual_seed(seed)
        Ghost(fit=False, force=True).apply(one, images())
    assert model.a.order is None
    assert not torch.equal(model.a.primary.weight, other.a.primary.weight)
    assert model(images()).shape == (6, 4)


def test_a_prepared_and_a_converted_network_are_saved_whole(tmp_path):
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    train(model, algo, x=images())
    gs_algos.save(model, tmp_path / "prepared")
    loaded = gs_algos.load(tmp_path / "prepared", net)
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
    resumed = Ghost.resume(loaded)
    assert resumed.steps == 3
    with pytest.raises(RuntimeError, match="give example_inputs"):
        resumed.convert(loaded)
    converted = resumed.convert(loaded, images())
    gs_algos.save(converted, tmp_path / "converted")
    again = gs_algos.load(tmp_path / "converted", net).eval()
    assert torch.equal(again(images()), model(images()))
    assert gs_algos.history(again)[-1]["stage"] == "converted"


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    model = Ghost(force=True).apply(net(), images())
    folder = gs_algos.save(model, tmp_path / "ghost")
    index = json.loads((folder / "golden_stick.json").read_text())
    for row in index["history"][0]["plan"]:
        if row["site"] == "a":
            row["settings"]["ratio"] = 400
    (folder / "golden_stick.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="fewer than its ratio of 400"):
        gs_algos.load(folder, net)


def test_ghosts_then_simqat_is_equal_to_the_trained_network_and_joins_codes(tmp_path, monkeypatch):
    joined = []

    def cat(tensors: Any, axis: int = 0, of_codes: Any = quantized_tensor._cat) -> Any:
        joined.append(len(tensors))
        return of_codes(tensors, axis)

    monkeypatch.setattr(quantized_tensor, "_cat", cat)
    trained = {}

    def fit(model: nn.Module, stage: Any) -> None:
        train(model, stage.algorithm, x=images())
        trained[stage.name] = model.eval()(images()).detach()

    pipeline = Pipeline([Ghost(force=True), SimQAT(weight="int8@channel", act="int8@tensor:ema")], tmp_path / "out")
    model = pipeline.run(net(), images(), fit)
    with torch.no_grad():
        joined.clear()
        for _ in range(3):  # as it is, recorded, replayed
            assert torch.equal(model(images()), trained["2-simqat"])
    assert joined
    loaded = gs_algos.load(tmp_path / "out" / "2-simqat", net).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), trained["2-simqat"])


class Residual(nn.Module):
    """Adds what a convolution gives to what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.a, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.last(F.relu(self.bn(self.a(x)) + x)).mean((2, 3))


def test_a_sum_behind_ghosts_is_of_codes_on_one_grid(monkeypatch):
    torch.manual_seed(0)
    model = Residual().eval()
    ghosts, algo = Ghost(force=True), SimQAT(weight="int8@channel", act="int8@tensor:ema")
    model = ghosts.convert(ghosts.apply(model, images()))
    (join,) = (row for row in algo.plan(model, images()).acted() if row.kind in ("add", "cat"))
    assert join.settings.operands == ("a.primary_norm", "a.cheap_norm", "act")
    model = algo.apply(model, images())
    train(model, algo, x=images())
    trained = model.eval()(images()).detach()
    model = algo.convert(model)

    def refuse(self: Any) -> Tensor:
        raise AssertionError("a value was read as a float")

    monkeypatch.setattr(quantized_tensor.QuantizedTensor, "values", refuse)
    with torch.no_grad():
        for _ in range(3):  # as it is, recorded, replayed
            assert torch.equal(model(images()), trained)


@pytest.mark.parametrize("quantized", [False, True])
def test_exported_networks_give_the_same(tmp_path, quantized):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    model = algo.convert(model).eval()
    if quantized:
        algo = SimQAT()
        model = algo.apply(model, images())
        algo.calibrate(model, [images()])
        model = algo.convert(model).eval()
    path = gs_algos.export_onnx(model, images(), tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: images().numpy()})[0]
    with torch.no_grad():
        want = model(images())
    assert float((torch.from_numpy(got) - want).norm() / want.norm()) < (0.05 if quantized else 1e-5)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        Ghost(force=True).plan(net(), images()[:0])
    with pytest.raises(ValueError, match="got none"):
        Ghost(force=True).apply(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    algo = Prune(rate=0.3)
    pruned = algo.apply(net(), images())
    with pytest.raises(RuntimeError, match="got one that prune prepared; convert it first"):
        Ghost(force=True).apply(pruned, images())
    ghost = Ghost(force=True)
    with pytest.raises(RuntimeError, match="call apply"):
        ghost.step()
    model = ghost.apply(net(), images())
    with pytest.raises(RuntimeError, match="ghost prepared; convert it first"):
        Ghost(force=True).apply(model, images())
    model = ghost.convert(model)
    with pytest.raises(RuntimeError, match="no ghost layers yet"):
        Ghost(force=True).apply(model, images())
    quantizer = SimQAT()
    converted = quantizer.convert(quantizer.apply(net(), images()))
    with pytest.raises(ValueError, match="got none"):
        Ghost(force=True).apply(converted, images())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1}, "ratio must be a whole number >= 2, got 1"),
        ({"ratio": 2.0}, "ratio must be a whole number"),
        ({"kernel": 2}, "kernel must be an odd number"),
        ({"fit": "yes"}, "fit must be True or False"),
        ({"rules": [("a", {"ratio": 0})]}, "rule 'a': ratio"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Ghost(**options)


def test_weights_that_are_not_finite_are_not_converted():
    algo = Ghost(force=True)
    model = algo.apply(net(), images())
    nn.init.constant_(model.a.cheap.weight, float("inf"))
    with pytest.raises(ValueError, match="finite outputs"):
        algo.convert(model)
    assert gs_algos.history(model)[-1]["stage"] == "prepared"


def test_a_report_compares_the_two_networks(tmp_path):
    algo = Ghost(force=True)
    model = algo.convert(algo.apply(net(), images()))
    page = gs_algos.report(net(), model, [images()])
    page.save(tmp_path / "page.html")
    assert "ghost" in (tmp_path / "page.html").read_text()
