"""Adder layers: which convolutions become one, their gradients, and 8-bit networks equal to the trained ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import Adder, Distill, Pipeline, SimQAT
from gs_algos.adder.layers import AdderConv2dInt8, AdderLayer, to_codes
from gs_kernels import adder_conv2d, quantize
from gs_kernels.runtime.dispatch import UnsupportedError
from tests.helpers import relative_rms
from tests.nets.convolutional import train
from tests.quant.integer.test_recorded_forward import is_recorded


class Net(nn.Module):
    """Has a convolution of every kind that a plan speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bn1 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.gn = nn.Conv2d(8, 12, 1), nn.GroupNorm(2, 12)
        self.grouped, self.bn2 = nn.Conv2d(12, 12, 3, groups=3), nn.BatchNorm2d(12)
        self.bare = nn.Conv2d(12, 8, 1)
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.fc = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.a(x)))
        x = F.relu(self.gn(self.b(x)))
        x = F.relu(self.bn2(self.grouped(x)))
        return self.fc(self.mirrored(F.relu(self.bare(x)))).mean((2, 3))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def images(seed: int = 0, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def prepared(seed: int = 0, **options: Any) -> tuple[nn.Module, Adder]:
    model, algo = net(seed), Adder(**options)
    torch.manual_seed(seed)
    return algo.apply(model, images()), algo


def fit(model: nn.Module, algo: Adder) -> None:
    """Trains a network so far that its outputs depend on its inputs: sums are far from what fresh norms expect."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9
    train(model, algo, x=images())
    model.eval()


def test_every_convolution_is_swapped_or_says_why_not():
    plan = Adder(rules=[("a", {"eta": 0.5})]).plan(net(), images())
    assert [(row.site, row.settings.eta) for row in plan.acted()] == [("a", 0.5), ("b", 0.2)]
    reasons = {row.site: row.reason for row in plan.kept()}
    assert reasons["stem"] == "is the stem"
    assert reasons["grouped"] == "has 3 groups, and adder layers have none"
    assert reasons["bare"].startswith("no norm follows, but relu: ")
    assert reasons["mirrored"] == "is padded by reflect, and adder layers only by zeros"
    assert reasons["fc"] == "is the classifier"
    assert "left by a rule" in str(Adder(rules=[("a", None)]).plan(net(), images()))


def test_a_layer_computes_differences_and_keeps_its_parameters():
    model = net()
    weight, bias = model.b.weight, model.b.bias
    Adder().apply(model, images())
    assert model.b.weight is weight
    assert isinstance(model.b, nn.Conv2d)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    want = -(x[:, None] - weight[:, :, 0, 0][None, :, :, None, None]).abs().sum(2) + bias[:, None, None]
    assert torch.allclose(model.b(x), want, atol=1e-4)
    assert set(model.state_dict()) == set(net().state_dict())


@pytest.mark.parametrize("int8", [False, True])
def test_the_gradient_of_a_weight_has_the_norm_that_eta_says(int8):
    model, _ = prepared(eta=0.3, int8=int8)
    model.train()(images()).square().sum().backward()
    for layer in (model.a, model.b):
        assert float(layer.weight.grad.norm()) == pytest.approx(0.3 * layer.weight.numel() ** 0.5, rel=1e-4)
    assert not torch.isnan(model.stem.weight.grad).any()
    model.zero_grad()
    (model(images()).sum() * 0).backward()
    assert not model.a.weight.grad.any()


def test_a_scaled_gradient_points_as_the_plain_one():
    model, _ = prepared()
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model.a(x).square().sum().backward()
    weight = model.a.weight.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    adder_conv2d(other, weight, 2, 1).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert float(F.cosine_similarity(weight.grad.flatten(), model.a.weight.grad.flatten(), 0)) > 0.9999


def test_on_a_grid_values_are_those_of_codes_and_gradients_stop_outside():
    model, _ = prepared(int8=True)
    layer = model.a
    layer.input_low.fill_(-1.0)
    layer.input_high.fill_(1.0)
    x = 4 * torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    scale, zero = layer.grid()
    low, high = (float(end) for end in torch.aminmax(layer.weight.detach()))
    assert float(scale) == pytest.approx((max(high, 1) - min(low, -1)) / 255)
    y = layer.eval()(x)
    codes, filters = ((torch.round(t / scale) + zero).clamp(-128, 127) - zero for t in (x, layer.weight))
    assert torch.equal(y, adder_conv2d(codes.detach(), filters.detach(), 2, 1) * scale)
    y.sum().backward()
    outside = (x > (127.5 - zero) * scale) | (x < (-128.5 - zero) * scale)
    assert outside.any()
    assert not x.grad[outside].any()
    assert x.grad[~outside].any()


@pytest.mark.parametrize("int8", [False, True])
def test_a_backward_pass_keeps_no_more_than_that_of_convolutions(int8):
    def kept(model: nn.Module) -> int:
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model.train()(images(count=16))
        assert y.requires_grad
        return sum(held.values())

    swapped, _ = prepared(int8=int8)
    assert kept(swapped) <= 1.1 * kept(net())


@pytest.mark.parametrize("start", ["normal", "float"])
def test_weights_start_as_the_option_says(start):
    model, before = net(), net().a.weight
    torch.manual_seed(3)
    Adder(start=start).apply(model, images())
    assert float(model.a.weight.detach().std()) == pytest.approx(1, abs=0.1)
    cosine = float(F.cosine_similarity(model.a.weight.flatten(), before.flatten(), 0))
    assert (cosine > 0.9999) == (start == "float")


@pytest.mark.parametrize("int8", [False, True])
def test_the_converted_network_is_the_trained_one_and_saved_so(tmp_path, int8):
    model, algo = prepared(int8=int8)
    fit(model, algo)
    gs_algos.save(model, tmp_path / "prepared")
    with torch.no_grad():
        want = model(images(4))
    assert len(want.unique(dim=0)) == len(want)
    resumed = gs_algos.load(tmp_path / "prepared", net).eval()
    with torch.no_grad():
        assert torch.equal(resumed(images(4)), want)
    again = Adder.resume(resumed)
    assert again.steps == 3
    converted = again.convert(resumed, images())
    assert isinstance(converted.a, AdderConv2dInt8) == int8
    assert ("8-bit codes" in again.summary(converted)) == int8
    gs_algos.save(converted, tmp_path / "converted")
    loaded = gs_algos.load(tmp_path / "converted", net).eval()
    with torch.no_grad():
        assert torch.equal(converted(images(4)), want)
        assert torch.equal(loaded(images(4)), want)


def test_a_converted_network_runs_as_it_was_recorded(tmp_path):
    model, algo = prepared(int8=True)
    fit(model, algo)
    trained = [model(images(seed)).detach() for seed in range(2)]
    assert not torch.equal(*trained)
    gs_algos.save(algo.convert(model), tmp_path)
    check_recorded(model, trained)
    check_recorded(gs_algos.load(tmp_path, net).eval(), trained)


@torch.no_grad()
def check_recorded(one: nn.Module, trained: list[Tensor]) -> None:
    assert torch.equal(one(images()), trained[0])  # layer by layer
    assert is_recorded(one, images())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdderConv2dInt8, "forward", None)  # no layer is called
        assert torch.equal(one(images(1)), trained[1])
    one.get_submodule("a").scale.mul_(2.0)  # is seen
    assert not torch.equal(one(images(1)), trained[1])


def test_codes_are_rounded_as_the_public_quantize_does():
    scale, zero = torch.tensor([0.0371]), torch.tensor([-7.0])
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    ties = (torch.arange(-300, 300) + 0.5) * scale
    for t in (x, ties):
        want = quantize(t, scale, zero, qmin=-128, qmax=127)
        assert torch.equal(to_codes(t, scale, zero).to(torch.int8), want)


def test_a_prepared_layer_sees_a_change_of_its_weight_and_is_copied():
    model, algo = prepared(int8=True)
    model.train()(images())
    layer: Any = algo.convert(model.eval(), images()).a
    x = images(1)[:, :1].repeat(1, 8, 1, 1)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    layer.weight.copy_(layer.weight.flip(0))
    assert torch.equal(layer(x), before.flip(1)) and not torch.equal(before, before.flip(1))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_a_converted_network_that_is_cast_keeps_its_grids(dtype, near):
    model, algo = prepared(int8=True)
    with torch.enable_grad():
        fit(model, algo)
    model = algo.convert(model)
    want, grid = model(images()), model.a.scale.clone()
    model = model.to(dtype)
    assert torch.equal(model.a.scale, grid) and model.a.weight.dtype == torch.int8
    x = images().to(dtype)
    got = [model(x) for _ in range(3)]  # as it is, and with what was prepared
    assert all(y.dtype == dtype and torch.equal(y, got[0]) for y in got)
    assert relative_rms(got[0], want) < near
    with pytest.raises(TypeError, match=r"the input must be float32 .* float64; cast it first"):
        model.a(x.double().repeat(1, 3, 1, 1)[:, :8])


@pytest.mark.parametrize("int8", [True, False])
@torch.no_grad()
def test_a_prepared_network_in_fp64_is_refused_with_the_name_of_the_layer(int8):
    model, _ = prepared(int8=int8)
    with pytest.raises(TypeError, match=r"the input of a must be float32 .* got float64; cast the network and its inp"):
        model.double()(images().double())


def test_a_copy_trains_on_alone():
    model, _ = prepared(int8=True)
    twin = copy.deepcopy(model)
    train(twin, Adder.resume(twin), x=images())
    assert not torch.equal(twin.a.weight, model.a.weight)
    assert isinstance(twin.a, AdderLayer)


def test_an_adder_network_learns():
    torch.manual_seed(0)
    model, algo = prepared()
    target = (images(count=48).mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model.train()(images(count=48)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_twin_is_trained_beside_the_network_by_kernel_features():
    torch.manual_seed(0)
    twin, model = net(1), net()
    algo = Distill(Adder(), teacher=twin, logits=0.5, labels=0.5, features=1.0, pairs=(("bn1", "bn1"),), kind="kernel")
    model = algo.apply(model, images())
    optimizer = torch.optim.SGD([*model.parameters(), *twin.parameters()], lr=0.01)
    loss_fn, target = algo.loss(F.cross_entropy), torch.randint(4, (6,))
    before = twin.a.weight.detach().clone()
    own = F.cross_entropy(twin.train()(images()), target)
    (loss_fn(model.train()(images()), target) + own).backward()
    beside = twin.a.weight.grad.clone()
    optimizer.step()
    algo.step()
    model = algo.convert(model)
    assert not torch.equal(before, twin.a.weight)
    alone = net(1)
    F.cross_entropy(alone.train()(images()), target).backward()
    assert torch.equal(alone.a.weight.grad, beside)  # nothing flows back
    assert gs_algos.history(model)[-1]["algorithm"] == "adder"


def test_in_a_pipeline_the_other_layers_are_quantized(tmp_path):
    def fit(model: nn.Module, stage: Any) -> None:
        train(model, stage.algorithm, x=images())

    pipeline = Pipeline([Adder(), SimQAT()], tmp_path / "out")
    model = pipeline.run(net(), images(), fit)
    sites = {row["site"]: row for row in gs_algos.history(model)[-1]["plan"]}
    assert sites["a"]["action"] == "keep"
    assert "adder_conv2d" in sites["a"]["reason"]
    assert sites["grouped"]["action"].startswith("quantize")
    loaded = gs_algos.load(tmp_path / "out" / "2-simqat", net).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model.eval()(images()))


@pytest.mark.parametrize("int8", [False, True])
def test_onnx_says_that_it_has_no_such_operation(tmp_path, int8):
    pytest.importorskip("onnx")
    model, algo = prepared(int8=int8)
    model = algo.convert(model)
    with pytest.raises(UnsupportedError, match="sums of absolute differences, got a, b; use export_package"):
        gs_algos.export_onnx(model, images(), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    model, _ = prepared()
    folder = gs_algos.save(model, tmp_path / "adder")
    index = json.loads((folder / "golden_stick.json").read_text())
    (row,) = [row for row in index["history"][0]["plan"] if row["site"] == "a"]
    row["site"] = "grouped"
    (folder / "golden_stick.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has 3 groups"):
        gs_algos.load(folder, net)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        Adder().plan(net(), images()[:0])
    with pytest.raises(ValueError, match="at least one convolution must be swappable, got none"):
        Adder().apply(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="call apply"):
        Adder().step()
    model, algo = prepared()
    with pytest.raises(RuntimeError, match="adder prepared; convert it first"):
        Adder().apply(model, images())
    nn.init.constant_(model.a.weight, float("nan"))
    with pytest.raises(ValueError, match="finite outputs"):
        algo.convert(model)
    assert gs_algos.history(model)[-1]["stage"] == "prepared"
    other, algo = prepared(int8=True)
    converted = algo.convert(other)
    with pytest.raises(RuntimeError, match="no adder layers yet"):
        Adder().apply(converted, images())


def test_a_batch_that_is_not_finite_moves_no_range():
    model, _ = prepared(int8=True)
    before = model.a.input_high.clone()
    model.train()(images() * float("inf"))
    assert torch.equal(model.a.input_high, before)
    model(images())
    assert not torch.equal(model.a.input_high, before)


def test_a_call_that_fails_leaves_the_network_as_it_was():
    model = net()
    before = copy.deepcopy(model.state_dict())
    bad = images()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        Adder(int8=True).apply(model, bad)
    assert type(model.a) is nn.Conv2d
    assert not hasattr(model.a, "input_low")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0}, "eta must be a number > 0, got 0"),
        ({"start": "zeros"}, "start must be normal or float"),
        ({"int8": 8}, "int8 must be True or False"),
        ({"rules": [("a", {"eta": float("nan")})]}, "rule 'a': eta"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Adder(**options)
