"""In eval mode a trained layer computes what its converted form will, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gs_algos import SLB, SimQAT
from gs_algos.quant.fake_quant import batch_norm
from gs_algos.quant.fake_quant.integer_inference import centered_codes, rounded_bias
from tests.nets.convolutional import SmallConvNet, images, train

SEARCHED = (
    {"weight": "2bit@channel", "act": "int8@tensor:ema"},
    {"weight": "2bit@channel", "act": "uint8@tensor:pact", "batch_norm": "state"},
    {"weight": "4bit@channel:learned", "act": "uint8@tensor:ema"},
    {"weight": "2bit", "act": "int4@tensor:ema", "rules": (("re:.*(fc|project).*", {"weight": "4bit@tensor"}),)},
)


def trained(algo: Any, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = algo.apply(SmallConvNet(), images())
    train(net, algo, steps)
    return net.eval()


@torch.no_grad()
def inferred(net: nn.Module, seed: int = 7) -> Tensor:
    return net(images(16, seed=seed))


@pytest.mark.parametrize("options", SEARCHED)
def test_searched_networks_convert_bit_for_bit(options: dict[str, Any]):
    algo = SLB(total_steps=3, **options)
    net = trained(algo)
    want = inferred(net)
    assert torch.equal(inferred(algo.convert(net)), want)


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
def test_floats_and_integers_agree_and_the_batch_norm_runs_once(fold: str):
    net = trained(SimQAT(fold_bn=fold, act="uint8@tensor:minmax"))
    whole = inferred(net)
    floats = net(images(16, seed=7))
    assert floats.grad_fn is not None
    # biases are whole steps on one side only, and a value on an edge may fall on either
    torch.testing.assert_close(whole, floats.detach(), rtol=0, atol=2e-2 * float(whole.abs().max()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(images(16, seed=7)).float()
    torch.testing.assert_close(half, whole, rtol=0, atol=0.1 * float(whole.abs().max()))


@pytest.mark.parametrize("make", [SimQAT, lambda: SLB(total_steps=9, act="int8@tensor:ema")])
def test_an_evaluation_leaves_no_trace_in_the_training(make: Any):
    nets = []
    for evaluates in (False, True):
        algo = make()
        net = trained(algo)
        if evaluates:
            inferred(net)
        train(net, algo)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_nan_stays_nan():
    net = trained(SimQAT())
    x = images()
    x[3, 0, 2, 2] = torch.nan
    with torch.no_grad():
        y = net(x)
    assert bool(y[3].isnan().all()) and bool(y[:3].isfinite().all())


def test_quantization_that_has_not_begun_leaves_floats():
    torch.manual_seed(0)
    net = SmallConvNet().eval()
    want = inferred(net)
    SimQAT(quant_delay=5, fold_bn=False).apply(net, images())
    torch.testing.assert_close(inferred(net), want)


def test_a_compiler_sees_floats():
    net = trained(SimQAT())
    with torch.no_grad():
        got = torch.compile(net, fullgraph=True, backend="eager")(images(16, seed=7))
    torch.testing.assert_close(got, inferred(net), rtol=0, atol=2e-2 * float(got.abs().max()))


def test_a_batch_norm_that_is_sharded_apart_runs_by_itself():
    net = trained(SimQAT(fold_bn=False))
    want = inferred(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.full_tensor = None  # what tells a DTensor
    with torch.no_grad():
        assert net.stem(images(16, seed=7)) not in batch_norm._normalized
    torch.testing.assert_close(inferred(net), want, rtol=0, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("fold", ["none", "one_conv"])
def test_a_batch_norm_that_is_replaced_still_normalizes_once(fold: str):
    net = trained(SimQAT(fold_bn=fold))
    want = inferred(net)
    replaced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(replaced.bn) is nn.SyncBatchNorm
    torch.testing.assert_close(inferred(replaced), want, rtol=0, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("options", [{"fold_bn": "two_conv"}, {"freeze_bn": 2}])
def test_a_batch_norm_that_works_with_its_layer_cannot_be_replaced(options: dict[str, Any]):
    net = trained(SimQAT(**options))
    with pytest.raises(RuntimeError, match="must stay as it is, got SyncBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)


def test_a_state_batch_norm_cannot_be_replaced():
    net = trained(SLB(weight="2bit@channel", batch_norm="state", total_steps=9))
    with pytest.raises(RuntimeError, match="must stay as it is"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_that_changes_what_a_layer_gives_changes_what_follows(mode: Any):
    net = trained(SimQAT(fold_bn=False))
    x = images(16, seed=7)

    def ablate(_: nn.Module, args: Any, y: Tensor) -> None:
        y[:, :4] = 0.0

    with mode():
        plain = net(x)
    net.stem.register_forward_hook(ablate)
    with mode():
        got = net(x)
    want = net(x).detach()
    assert not torch.allclose(got, plain, atol=5e-2 * float(want.abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-2 * float(want.abs().max()))


def test_a_batch_norm_that_is_called_again_gives_the_same_again():
    net = trained(SimQAT(fold_bn=False))
    with torch.no_grad():
        y = net.stem(images(16, seed=7))
        once = net.bn(y).clone()
        net.bn(y).fill_(7.0)
        torch.testing.assert_close(net.bn(y), once, rtol=1e-4, atol=1e-4)


def test_what_a_hook_keeps_of_a_layer_can_be_saved(tmp_path: Path):
    net = trained(SimQAT(fold_bn=False))
    with torch.no_grad():
        y = net.stem(images(16, seed=7))
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt"), y) and y in batch_norm._normalized


@pytest.mark.parametrize(
    "algo",
    [
        SimQAT(fold_bn="two_conv"),
        SimQAT(fold_bn=False),
        SLB(weight="2bit@channel", act="int8@tensor:ema", batch_norm="state", total_steps=9),
    ],
    ids=["two_conv", "none", "state"],
)
def test_copies_and_what_a_spawned_process_gets_compute_the_same(algo: Any):
    net = trained(algo)
    want = inferred(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()]
        assert torch.equal(inferred(other), want)
    assert torch.equal(inferred(pickle.loads(pickle.dumps(algo.convert(copy.deepcopy(net))))), want)


def test_a_bias_is_a_whole_number_of_steps_where_fp32_counts_them():
    scale, x_scale = torch.tensor([0.3, 0.3, 1e-12, 0.0]), torch.tensor([0.05])
    bias = torch.tensor([1.0, -0.001, 1.0, 2.0])
    got = rounded_bias(bias, scale, x_scale)
    assert torch.equal(got[:2], torch.tensor([67.0, 0.0]) * (scale[:2] * x_scale)) and torch.equal(got[2:], bias[2:])


def test_steps_are_found_again_at_every_scale():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1000, 1, generator=generator).exp() * 10.0 ** torch.arange(-20, 20).repeat(25)[:, None]
    steps = torch.arange(-255, 256) * 0.5
    assert torch.equal(centered_codes(steps * scale, scale), steps.expand(1000, -1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("searched", [False, True])
def test_gradients_change_no_value_in_eval_and_are_those_of_rounded_floats(searched: bool, frozen: bool):
    net = trained(SLB(total_steps=9, **SEARCHED[0]) if searched else SimQAT())
    want = inferred(net)
    for parameter in net.parameters():
        parameter.requires_grad_(not frozen)
        parameter.grad = None
    x = images(16, seed=7).requires_grad_()
    y = net(x)
    assert torch.equal(y, want)
    y.square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert any(parameter.grad is not None for parameter in net.parameters()) is not frozen
