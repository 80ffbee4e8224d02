"""Folded and unfolded networks agree to 1e-5 on every pattern; every trap is left untouched, correct, and explained."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from gs_algos.fx.fold_batch_norm import fold_bn, fold_model
from tests.nets.graphs import (
    Chain,
    ConvCalledTwice,
    ConvIsAlsoOutput,
    DropPath,
    FlatOpaque,
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
    image,
    trained,
)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y - want).detach().norm() / want.detach().norm())


def conv_net(dim: int, act: nn.Module, **options: object) -> nn.Module:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim](4, 6, 3, **options)  # type: ignore[arg-type]
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim](6)
    return Chain(conv=conv, bn=bn, act=act)


@pytest.mark.parametrize(
    "net, shape",
    [
        (conv_net(1, nn.ReLU()), (2, 4, 9)),
        (conv_net(2, nn.ReLU6(), bias=False), (2, 4, 7, 7)),
        (conv_net(2, nn.Hardswish(), stride=2, padding=1, groups=2), (2, 4, 7, 7)),
        (conv_net(2, nn.SiLU(), padding="same", padding_mode="reflect"), (2, 4, 7, 7)),
        (conv_net(3, nn.GELU(), dilation=2), (2, 4, 6, 6, 6)),
        (Chain(fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), act=nn.ReLU()), (5, 4)),
        (Chain(fc=nn.Linear(4, 6, bias=False), bn=nn.BatchNorm1d(6, affine=False)), (5, 4)),
        (Chain(conv=nn.Conv2d(4, 6, 3), same=nn.Identity(), bn=nn.BatchNorm2d(6)), (2, 4, 7, 7)),
        (Chain(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6, eps=0.3, momentum=None)), (2, 4, 7, 7)),
        (Chain(conv=nn.Conv2d(4, 6, 3), bn=NormAct(6)), (2, 4, 7, 7)),
        (nn.SyncBatchNorm.convert_sync_batchnorm(conv_net(2, nn.ReLU())), (2, 4, 7, 7)),
        (nn.DataParallel(conv_net(2, nn.ReLU())), (2, 4, 7, 7)),
    ],
)
def test_every_norm_is_folded_and_the_output_stays(net, shape):
    net, x = trained(net), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = net(x)
    assert fold_model(net, x) is net
    assert norms(net) == 0 and relative(net(x), want) <= 1e-5


def test_parallel_branches_fold_one_by_one():
    net, x = trained(ParallelBranches()), image(4)
    want = net(x)
    fold_model(net, x)
    assert norms(net) == 1 and isinstance(net.identity, nn.BatchNorm2d)
    assert relative(net(x), want) <= 1e-5


@pytest.mark.parametrize("net", [UnknownToExport(), Opaque()])
def test_lower_rungs_fold_what_they_see(net):
    net, x = trained(net), image()
    want = net(x)
    fold_model(net, x)
    assert norms(net) == 0 and relative(net(x), want) <= 1e-5


@pytest.mark.parametrize(
    "net, channels, reason",
    [
        (ConvCalledTwice(), 4, "conv stays: called 2 times in one forward pass"),
        (OneConvTwoNorms(), 3, "bn1 stays: conv feeds 2 batch norms (bn1, bn2)"),
        (OneNormTwoConvs(), 3, "bn stays: bn called 2 times in one forward pass"),
        (NormBeforeConv(), 3, None),
        (Chain(conv=StandardisedConv(3, 4, 3), bn=nn.BatchNorm2d(4)), 3, "conv stays: StandardisedConv has a forward"),
        (TiedConvs(), 3, "a stays: weight is tied to b.weight"),
        (WeightReadElsewhere(), 3, "conv stays: its parameters are also read by"),
        (ConvIsAlsoOutput(), 3, "bn stays: the output of conv has 2 readers"),
        (Chain(conv=nn.Conv2d(3, 4, 3), drop=nn.Dropout(0.7), bn=nn.BatchNorm2d(4)), 3, None),
        (Chain(conv=nn.Conv2d(3, 4, 3), path=DropPath(), bn=nn.BatchNorm2d(4)), 3, None),
        (Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4, track_running_stats=False)), 3, "no running statistics"),
        (Chain(conv=nn.ConvTranspose2d(3, 4, 3), bn=nn.BatchNorm2d(4)), 3, "conv stays: ConvTranspose2d is not"),
        (FlatOpaque(), 3, "bn stays: what feeds it is not known"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_trap_is_left_alone(net, channels, reason, caplog):
    net, x = trained(net), image(channels)
    before, want = copy.deepcopy(net.state_dict()), net(x)
    with caplog.at_level(logging.INFO, "gs_algos.fx.fold_batch_norm"):
        fold_model(net, x)
    after, y = net.state_dict(), net(x)
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    y, want = (y["out"], want["out"]) if isinstance(y, dict) else (y, want)
    assert torch.equal(y, want)
    assert reason in caplog.text if reason else caplog.text == ""


def test_a_hooked_conv_keeps_showing_its_own_output():
    net, x, seen = trained(Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))), image(), []
    net.conv.register_forward_hook(lambda _, __, y: seen.append(y))
    net(x)
    fold_model(net, x)
    net(x)
    assert norms(net) == 1 and torch.equal(seen[0], seen[-1])


def test_a_norm_left_in_training_mode_is_not_folded():
    net = trained(Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    net.bn.train()
    assert norms(fold_model(net, image())) == 1


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model must be in eval mode, got training mode; call model.eval\(\)"):
        fold_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image())


def test_the_weight_stays_the_same_parameter():
    net = trained(Chain(conv=nn.Conv2d(3, 4, 3, bias=False), bn=nn.BatchNorm2d(4)))
    weight = net.conv.weight
    fold_model(net, image())
    assert net.conv.weight is weight and isinstance(net.bn, nn.Identity) and net.conv.bias is not None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_fold_of_a_transposed_conv(dim, groups):
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dim]
    bn = trained({1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim](6))
    conv, folded = kind(4, 6, 3, groups=groups), kind(4, 6, 3, groups=groups)
    weight, bias = fold_bn(conv, bn)
    folded.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, 4, *[5] * dim, generator=torch.Generator().manual_seed(0))
    assert relative(folded(x), bn(conv(x))) <= 1e-5


def test_a_half_precision_fold_is_computed_in_fp32():
    conv, bn = nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4))
    exact, _ = fold_bn(conv, bn)
    half, _ = fold_bn(conv.bfloat16(), bn)
    again, _ = fold_bn(conv.float(), bn)
    assert half.dtype == torch.bfloat16 and torch.equal(half, again.bfloat16())
    assert relative(half.float(), exact) < 1e-2


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="must have the layer's 4 output channels, got 5"):
        fold_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="must have running statistics"):
        fold_bn(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
