"""What reads pruned channels, refitted by least squares: nearer outputs, the exact optimum, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SCOP, Prune
from gs_algos.core.input_rows import input_rows
from gs_algos.core.input_statistics import InputStatistics
from gs_algos.core.modules import get_module
from gs_algos.pruning.reconstruct import least_squares, readers_of
from tests.helpers import relative_rms
from tests.nets.convolutional import SmallConvNet, images, mlp


def data(count: int = 4) -> list[Tensor]:
    return [images(seed=i) for i in range(count)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet().eval()


def outputs(net: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a layer makes of the batches, in eval mode."""
    seen = []
    handle = get_module(net, name).register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    with torch.no_grad():
        for x in batches:
            net.eval()(x)
    handle.remove()
    return torch.cat(seen)


def test_least_squares_is_the_solution_of_lstsq():
    generator = torch.Generator().manual_seed(0)
    floats, target = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    x = floats + 0.3 * torch.randn(200, 6, generator=generator)
    columns = torch.tensor([True, False, True, True, False, True])
    statistics = InputStatistics(6, cross=True)
    statistics.update(x, floats)
    got = least_squares(target * columns, target, statistics, columns, damp=1e-9)
    want = torch.linalg.lstsq(x[:, columns].double(), (floats @ target.t()).double()).solution.t()
    torch.testing.assert_close(got[:, columns].double(), want, rtol=1e-4, atol=1e-5)
    assert not got[:, ~columns].any()


def test_groups_of_a_convolution_are_solved_each_from_its_own_inputs():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(8, 4, 7, 7)
    weight, columns = layer.weight.detach().flatten(1), torch.ones(18, dtype=torch.bool)
    columns[9:] = False  # the second channel of either group
    statistics = InputStatistics(18, 2)
    statistics.update(input_rows(layer, x))
    got = least_squares(weight * columns, weight, statistics, columns, damp=1e-9)
    for group in range(2):
        rows = F.unfold(x[:, 2 * group : 2 * group + 2], 3).mT.flatten(0, 1).double()
        theirs = weight[3 * group : 3 * group + 3].double()
        want = torch.linalg.lstsq(rows[:, :9], rows @ theirs.t()).solution.t()
        torch.testing.assert_close(got[3 * group : 3 * group + 3, :9].double(), want, rtol=1e-3, atol=1e-5)


def test_more_damping_keeps_weights_nearer_to_what_they_were():
    torch.manual_seed(0)
    x, weight, columns = torch.randn(50, 4), torch.randn(2, 4), torch.tensor([True, True, True, False])
    statistics = InputStatistics(4)
    statistics.update(x)
    changes = [
        (least_squares(weight * columns, weight, statistics, columns, damp) - weight * columns).norm().item()
        for damp in (1e-4, 1.0, 1e4)
    ]
    assert changes[0] > changes[1] > changes[2] and changes[2] < 1e-3


@pytest.mark.parametrize("reader", ["block.conv2", "fc"])
def test_outputs_of_what_reads_pruned_channels_come_nearer(reader):
    net, batches = small(), data()
    whole = copy.deepcopy(net)
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, images())
    want, before = outputs(whole, reader, batches), outputs(net, reader, batches)
    algo.reconstruct(net, batches)
    kept = before.abs().sum((0, *range(2, before.dim()))) > 0  # a layer may itself have lost outputs
    after = outputs(net, reader, batches)
    assert relative_rms(after[:, kept], want[:, kept]) < 0.8 * relative_rms(before[:, kept], want[:, kept])


def test_a_layer_that_loses_outputs_too_keeps_its_zeros():
    net = mlp()
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, torch.randn(4, 16))
    zeros = [net[2].weight == 0, net[2].bias == 0]
    before = net[2].weight.detach().clone()
    algo.reconstruct(net, [torch.randn(32, 16)])
    assert not torch.equal(net[2].weight, before)
    assert torch.equal(net[2].weight == 0, zeros[0]) and torch.equal(net[2].bias == 0, zeros[1])


def test_a_reconstructed_network_is_cut_saved_and_loaded(tmp_path):
    net = small()
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, images())
    algo.reconstruct(net, data())
    algo.refresh(net, data())
    with torch.no_grad():
        want = net.eval()(images())
    net = algo.convert(net)
    gs_algos.save(net, tmp_path / "cut")
    with torch.no_grad():
        torch.testing.assert_close(gs_algos.load(tmp_path / "cut", small).eval()(images()), want)
    assert net.block.conv2.in_channels == 4


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.read = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(torch.tanh(self.first(x))) + self.read(torch.tanh(self.second(-x)))

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(64, 6)
    whole = copy.deepcopy(net)
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, x)
    keep = net.kept_units
    hidden = [torch.tanh(layer(sign * x)) for layer, sign in ((whole.first, 1), (whole.second, -1))]
    rows = F.pad(torch.cat(hidden)[:, keep], (0, 1), value=1.0).double().detach()
    target = torch.cat([whole.read(h) for h in hidden]).double().detach()
    want = torch.linalg.lstsq(rows, target).solution.t()
    algo.reconstruct(net, [x])
    got = torch.cat([net.read.weight[:, keep], net.read.bias[:, None]], 1).double().detach()
    assert relative_rms(rows @ got.t(), target) < 1.001 * relative_rms(rows @ want.t(), target)


def test_scop_reconstructs_once_its_cut_is_decided():
    net = small()
    algo = SCOP(rate=0.5, select_steps=2, reconstruct=True)
    net = algo.apply(net, images())
    with pytest.raises(RuntimeError, match="the cut must be decided, got step 0 of 2"):
        algo.reconstruct(net, data())
    for x in data(2):
        F.cross_entropy(net.train()(x), torch.arange(8) % 4).backward()
        algo.step()
    before = net.block.conv2.weight.detach().clone()
    algo.reconstruct(net, data())
    assert not torch.equal(net.block.conv2.weight, before)


def test_only_readers_of_what_goes_are_refitted():
    net = small()
    algo = Prune(rate=0.5, importance="l2", reconstruct=True, rules=[("stem", None)])
    algo.apply(net, images())
    assert [reader.name for reader in readers_of(net, algo.groups, net.kept_units)] == ["block.conv2", "fc"]


def test_what_went_is_gone_after_a_step_and_without_the_option():
    net = small()
    algo = Prune(rate=0.5, importance="l2")
    net = algo.apply(net, images())
    with pytest.raises(RuntimeError, match="must be kept, got reconstruct=False; make Prune"):
        algo.reconstruct(net, data())
    net = small()
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, images())
    algo.step()
    with pytest.raises(RuntimeError, match="must be kept, got a step"):
        algo.reconstruct(net, data())


@pytest.mark.parametrize("batches, words", [([], "at least one batch"), ([images(), images() / 0], "must be finite")])
def test_bad_data_leaves_the_weights_as_they_were(batches, words):
    net = small()
    algo = Prune(rate=0.5, importance="l2", reconstruct=True)
    net = algo.apply(net, images())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=words):
        algo.reconstruct(net, batches)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    algo.reconstruct(net, data())  # what went is still there
