"""How far a compressed network is from the float one, layer by layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gs_algos import PTQ, SLB, Prune, SimQAT, quantize_weights
from gs_algos.analysis.compare import compare
from gs_algos.analysis.comparison import Histogram


class Net(nn.Module):
    """A residual block with batch norms, an activation outside of modules, and one that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.bn_a(self.a(x)))
        return self.fc(F.relu(self.bn_b(self.b(x)) + x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for norm in (net.bn_a, net.bn_b):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.3, 3)
        norm.weight.data.uniform_(-1.5, 1.5)
    return net.eval()


@pytest.fixture
def batches():
    return list(torch.randn(3, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def compressed(algo, net, batches):
    new = algo.apply(copy.deepcopy(net), batches[0])
    if hasattr(algo, "calibrate"):
        algo.calibrate(new, batches)
    return algo.convert(new, batches[0])


def by_name(comparison):
    return {one.site: one for one in comparison.layers}


@pytest.mark.parametrize(
    "algo", [SimQAT(weight="int8@channel", act="int8@tensor"), PTQ(weight="int8@channel", act="int8@tensor")]
)
def test_layers_are_compared_behind_what_they_have_taken_over(net, batches, algo):
    found = compare(net, compressed(algo, net, batches), batches)
    layers = by_name(found)
    assert set(layers) == {"a", "b", "fc"}
    for one in layers.values():
        assert one.sqnr > 25 and one.local_sqnr > 25 and one.cosine > 0.998
        assert one.weight.startswith("int8") and one.act.startswith("int8") and one.clipped < 0.05
    assert found.output_sqnr == layers["fc"].sqnr > 25


def test_errors_are_those_of_the_formula(net, batches):
    new = quantize_weights(copy.deepcopy(net), "int2@channel", progress=False)
    layer = by_name(compare(net, new, batches))["b"]
    with torch.no_grad():
        xs = torch.cat(batches)
        own = [net.relu(net.bn_a(net.a(xs))), new.relu(new.bn_a(new.a(xs)))]
        want, local, got = net.b(own[0]), new.b(own[0]), new.b(own[1])
    for value, y in ((layer.sqnr, got), (layer.local_sqnr, local)):
        expected = 10 * math.log10(float(want.double().square().sum() / (y - want).double().square().sum()))
        assert value == pytest.approx(expected, abs=1e-3)
    assert layer.cosine == pytest.approx(float(F.cosine_similarity(want.flatten(), got.flatten(), 0)), abs=1e-5)


def test_a_weight_is_seen_in_steps_of_its_scales(net, batches):
    new = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    layer = by_name(compare(net, new, batches))["fc"]
    assert layer.weight_grid == tuple(range(int(layer.weight_grid[0]), int(layer.weight_grid[-1]) + 1))
    assert layer.levels_used <= layer.levels == 16 and sum(layer.weight_values.counts) == 40
    assert layer.weight_grid[0] - 0.6 < layer.weight_values.low < layer.weight_values.high < layer.weight_grid[-1] + 0.6


def test_folded_batch_norms_are_in_the_picture_of_the_weight(net, batches):
    new = compressed(SimQAT(weight="int8@channel", act="int8@tensor"), net, batches)
    layer = by_name(compare(net, new, batches))["a"]
    assert max(abs(layer.weight_values.low), layer.weight_values.high) == pytest.approx(127, abs=1)


def test_bytes_and_bits_are_those_of_the_tensors(net, batches):
    new = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    layers = by_name(compare(net, new, batches))
    held = new.state_dict()
    for name, one in layers.items():
        assert one.nbytes == sum(t.numel() * t.element_size() for key, t in held.items() if key.startswith(f"{name}."))
        assert one.bits == 8 * getattr(new, name).nbytes / getattr(net, name).weight.numel()
    assert layers["fc"].float_nbytes == 4 * (40 + 5)


def test_clipped_inputs_are_counted(net, batches):
    new = compressed(SimQAT(weight="int8@channel", act="int8@tensor"), net, batches)
    new.b.input_quantizer.scale.mul_(0.5)
    with torch.no_grad():
        x = net.relu(net.bn_a(net.a(torch.cat(batches))))
    layer = by_name(compare(net, new, batches))["b"]
    low, high = layer.input_range
    step = float(new.b.input_quantizer.scale)
    assert layer.clipped == pytest.approx(float(((x < low - step / 2) | (x > high + step / 2)).float().mean()))
    assert layer.clipped > 0.005


def test_prepared_networks_and_searched_layers_are_compared(net, batches):
    algo = SLB(weight="2bit@channel", act="int8@tensor", total_steps=10)
    new = algo.apply(copy.deepcopy(net), batches[0])
    algo.calibrate(new, batches)
    assert by_name(compare(net, new, batches))["b"].sqnr > 0
    layer = by_name(compare(net, algo.convert(new, batches[0]), batches))["b"]
    assert (layer.weight, layer.levels, len(layer.weight_grid)) == ("2bit@channel", 4, 4)


def test_pruned_layers_have_no_common_outputs_and_a_note(net, batches):
    algo = Prune(rate=0.5)
    found = compare(net, algo.convert(algo.apply(copy.deepcopy(net), batches[0]), batches[0]), batches)
    layers = by_name(found)
    assert layers["a"].sqnr is None and layers["a"].nbytes < layers["a"].float_nbytes
    assert layers["fc"].sqnr is not None and any("another shape" in note for note in found.notes)


def test_a_network_and_itself_differ_in_nothing(net, batches):
    found = compare(net, copy.deepcopy(net), batches)
    assert found.output_sqnr == math.inf and {one.sqnr for one in found.layers} == {math.inf}
    assert "exact" in str(found)


def test_layers_that_give_nan_are_named(net, batches):
    new = copy.deepcopy(net)
    new.b.weight.data[0] = math.nan
    found = compare(net, new, batches)
    assert math.isnan(by_name(found)["b"].sqnr) and any("NaN" in note and "b" in note for note in found.notes)


def test_both_networks_stay_as_they_were(net, batches):
    new = compressed(SimQAT(weight="int4@channel", act="int8@tensor"), net, batches)
    before = [copy.deepcopy(one.state_dict()) for one in (net, new)]
    net.train()
    want = new(batches[0])
    compare(net, new, batches)
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for n in (net, new) for m in n.modules())
    for held, one in zip(before, (net, new), strict=True):
        assert all(torch.equal(t, held[key]) for key, t in one.state_dict().items())
    assert torch.equal(new(batches[0]), want)


def test_labels_of_a_data_loader_are_left_out(net, batches):
    pairs = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
    new = quantize_weights(copy.deepcopy(net), "int4@channel", progress=False)
    assert str(compare(net, new, pairs)) == str(compare(net, new, batches))


def test_networks_that_do_not_belong_together_are_refused(net, batches):
    with pytest.raises(ValueError, match="layers of the same names, got none in common"):
        compare(net, nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), batches)
    other = copy.deepcopy(net)
    other.fc = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"outputs of one shape, got \[\[6, 5\]\] and \[\[6, 4\]\]"):
        compare(net, other, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        compare(net, net, [])


def test_a_histogram_counts_finite_values_only():
    found = Histogram.of(torch.tensor([0.0, 1.0, math.nan, math.inf, 0.25]), bins=4)
    assert (found.low, found.high, found.counts) == (0.0, 1.0, (1, 1, 0, 1))
    assert Histogram.of(torch.full((3,), math.nan)) is None
    assert Histogram.of(torch.full((3,), 2.0)).counts == (3,)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_a_layer_that_calls_a_function_is_the_layer_of_that_function():
    torch.manual_seed(0)
    net = nn.Sequential(PadsItself(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    xs = list(torch.randn(2, 4, 3, 8, 8))
    new = compressed(SimQAT(weight="int8@channel", act="int8@tensor"), net.eval(), xs)
    first = compare(net, new, xs).layers[0]
    assert (first.site, first.float_site) == ("0.weight_conv2d", "0")
    assert first.sqnr > 30 and first.local_sqnr > 30 and first.float_nbytes == 4 * (8 * 27 + 8)
