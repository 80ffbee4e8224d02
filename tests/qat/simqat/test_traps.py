"""Before quantization starts a prepared network is the float one, in both modes, on every pattern and every trap."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gs_algos import SimQAT
from tests.nets.graphs import (
    Chain,
    ConvCalledTwice,
    ConvIsAlsoOutput,
    DropPath,
    Functional,
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

FOLDS = ("none", "one_conv", "two_conv")
TOLERANCE = 1e-5  # relative RMS
AFTER_STEPS = 1e-4  # an optimizer step on a batch norm with little variance makes a difference of 1e-7 ten times larger


class Conv1dNet(nn.Module):
    """Conv1d and Linear with their batch norms, on `[B, 3, 8, 8]` as 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.SiLU()
        self.fc, self.fc_bn = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_bn(self.fc(self.act(self.bn(self.conv(x.flatten(2)))).mean(2)))


class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1), padding_mode="circular"), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x[:, :, None]))


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, **options)  # type: ignore[arg-type]


# name -> (how to build it, channels of the image, layers quantized, batch norms folded into one)
NETS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "conv, norm, act": (lambda: Chain(conv=conv(bias=False), bn=nn.BatchNorm2d(4), act=nn.ReLU6()), 3, 1, 1),
    "conv with bias": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4), act=nn.Hardswish()), 3, 1, 1),
    "groups, stride": (lambda: Chain(a=nn.Conv2d(4, 6, 3, 2, 1, groups=2), bn=nn.BatchNorm2d(6)), 4, 1, 1),
    "conv1d and linear": (Conv1dNet, 3, 2, 2),
    "conv3d": (Conv3dNet, 3, 1, 1),
    "no affine": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4, affine=False)), 3, 1, 1),
    "eps and momentum": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4, eps=0.3, momentum=0.7)), 3, 1, 1),
    "mean over all batches": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4, momentum=None)), 3, 1, 1),
    "dropout behind": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4), drop=nn.Dropout(0.3)), 3, 1, 1),
    "activation in the norm": (lambda: Chain(conv=conv(), bn=NormAct(4)), 3, 1, 1),
    "parallel branches": (ParallelBranches, 4, 2, 2),
    "functional": (Functional, 3, 2, 0),
    "read by symbolic_trace": (UnknownToExport, 3, 2, 2),
    "read by children": (Opaque, 3, 2, 1),
    "conv called twice": (ConvCalledTwice, 4, 0, 0),
    "one conv, two norms": (OneConvTwoNorms, 3, 1, 0),
    "one norm, two convs": (OneNormTwoConvs, 3, 2, 0),
    "norm before conv": (NormBeforeConv, 3, 1, 0),
    "batch norm of weights": (lambda: Chain(conv=StandardisedConv(3, 4, 3), bn=nn.BatchNorm2d(4)), 3, 0, 0),
    "tied weights": (TiedConvs, 3, 0, 0),
    "weight read elsewhere": (WeightReadElsewhere, 3, 0, 0),
    "conv is also output": (ConvIsAlsoOutput, 3, 1, 0),
    "dropout between": (lambda: Chain(conv=conv(), drop=nn.Dropout(0.5), bn=nn.BatchNorm2d(4)), 3, 1, 0),
    "drop path between": (lambda: Chain(conv=conv(), path=DropPath(), bn=nn.BatchNorm2d(4)), 3, 1, 0),
    "no running statistics": (lambda: Chain(conv=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False)), 3, 1, 0),
}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm().clamp(min=1e-12))


def output(net: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)  # dropout
        y = net(x)
    return torch.cat([value.flatten() for value in y.values()]) if isinstance(y, dict) else y


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, channels, layers, _ = NETS[name]
    torch.manual_seed(0)
    net = trained(make())
    if not layers:  # apply needs a layer, and what comes behind a trap must not matter
        net = nn.Sequential(net, nn.Conv2d(net(image(channels)).shape[1], 4, 1)).eval()
    return net, image(channels, batch=4)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", NETS)
def test_a_prepared_network_is_the_float_network_until_quantization_starts(name, fold):
    net, x = build(name)
    reference, exact = copy.deepcopy(net).double(), x.double()  # a bias before a batch norm learns rounding alone
    algo = SimQAT(quant_delay=9, fold_bn=fold)
    plan = algo.plan(net, x)
    layers = [row for row in plan.acted() if row.kind not in ("add", "cat")]
    assert len(layers) == max(NETS[name][2], 1) and sum(row.settings.bn is not None for row in layers) == NETS[name][3]
    net = algo.apply(net, x)
    assert relative(output(net, x), output(reference, exact)) <= TOLERANCE
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (net, reference)]
    for _ in range(2):
        got, want = output(net.train(), x), output(reference.train(), exact)
        assert relative(got, want) <= (TOLERANCE if algo.steps == 0 else AFTER_STEPS)
        for y, optimizer in zip((got, want), optimizers, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        algo.step()
    for each, inputs in ((net, x), (reference, exact)):
        output(each.train(), inputs)  # statistics move on although no step follows
    assert relative(output(net.eval(), x), output(reference.eval(), exact)) <= AFTER_STEPS
    state = net.state_dict()
    for key, value in reference.state_dict().items():
        if value.is_floating_point() or not isinstance(reference.get_submodule(key.rpartition(".")[0]), NormAct):
            assert (state[key] - value).abs().max() <= AFTER_STEPS * value.abs().max().clamp(min=1e-2), key


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", NETS)
def test_a_trap_trains_and_converts_to_what_it_computed(name, fold):
    net, x = build(name)
    algo = SimQAT(fold_bn=fold)
    net = algo.apply(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    output(net.train(), x).square().mean().backward()
    optimizer.step()
    algo.step()
    with torch.no_grad():
        want = output(net.eval(), x)
        got = output(algo.convert(net), x)
    assert relative(got, want) <= TOLERANCE
    # three dimensions are multiplied as floats, and a Hardswish has a last place
    assert torch.equal(got, want) or name in ("conv3d", "conv with bias")
