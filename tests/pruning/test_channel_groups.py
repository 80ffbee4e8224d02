"""Coupled channel groups: what goes together in every architecture, and that a cut network is the masked network."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gs_algos.core.algorithm import split_inputs
from gs_algos.demo.models import build
from gs_algos.pruning.channel_groups.find import find_groups
from gs_algos.pruning.channel_groups.groups import FIXED, Groups, decode, encode
from gs_algos.pruning.cut import cut, mask
from tests.nets.convolutional import SmallConvNet, images


class DenseNet(nn.Module):
    """Batch norm in front of every conv, on the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.silu(torch.cat(features, 1)).mean((2, 3)))


class Gate(nn.Module):
    """Squeeze and excitation with a sigmoid, which makes something of a zero; then a depthwise conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.down, self.up = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12)
        self.act = nn.PReLU(24)
        self.grouped = nn.Conv2d(24, 12, 3, groups=3)
        self.back = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.fc = nn.Linear(8 * 20 * 20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        y = self.back(self.grouped(self.act(self.depthwise(y))))
        return self.fc(torch.sigmoid(y).flatten(1))


class LlamaBlock(nn.Module):
    """RMS norms, rotary positions, two query heads for each key head, a gated MLP; embeddings tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
        config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def ids() -> Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def pictures(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def demo(name: str, size: int) -> Callable[[], nn.Module]:
    return lambda: build(name, in_channels=3, num_classes=5, image_size=size)


# network, inputs, groups that can lose something, share of the parameters left when a bit less than half is cut
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "resnet": (demo("resnet20", 16), pictures(), 12),
    "mobilenetv2": (demo("mobilenetv2", 16), pictures(), 25),
    "vit": (demo("vit-tiny", 8), pictures(8), 12),
    "densenet": (DenseNet, pictures(), 4),
    "gated": (Gate, pictures(), 4),
    "llama": (LlamaBlock, ids(), 2),
}


def some_gone(groups: Groups, share: float = 0.45) -> Tensor:
    keep, generator = groups.everything(), torch.Generator().manual_seed(3)
    for group in groups.prunable():
        gone = torch.randperm(group.n, generator=generator)[: max(1, int(share * group.n))]
        keep[group.first + gone] = False
    return keep


def outputs(net: nn.Module, x: Any) -> Tensor:
    args, kwargs = split_inputs(x)
    with torch.no_grad():
        return net.eval()(*args, **kwargs)


def randomised(net: nn.Module) -> nn.Module:
    """In fp64, with statistics and biases that are not the ones of a new network."""
    generator = torch.Generator().manual_seed(2)
    net = net.double()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1 and "inv_freq" not in name:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return net


@pytest.mark.parametrize("make, x, n", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_cut_network_is_the_masked_network(make, x, n):
    torch.manual_seed(0)
    net = randomised(make())
    groups = find_groups(net, x)
    assert len(groups.prunable()) == n, str(groups)
    keep = some_gone(groups)
    masked, sliced = copy.deepcopy(net), copy.deepcopy(net)
    mask(masked, groups, keep)
    cut(sliced, groups, keep)
    want, got = outputs(masked, x), outputs(sliced, x)
    assert float((got - want).abs().max()) <= 1e-13 * float(want.abs().max())
    assert not torch.allclose(want, outputs(net, x), rtol=1e-3)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert sum(p.numel() for p in sliced.parameters()) == groups.numel(shapes, keep)


def test_where_arithmetic_is_exact_so_is_the_cut():
    net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 7, 3), nn.Flatten(), nn.Linear(7 * 16, 3)).double()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.copy_(torch.randint(-4, 5, p.shape, generator=generator))
    x = torch.randint(-8, 9, (2, 3, 8, 8), generator=generator).double()
    groups = find_groups(net, x)
    keep = some_gone(groups)
    masked, sliced = copy.deepcopy(net), copy.deepcopy(net)
    mask(masked, groups, keep)
    cut(sliced, groups, keep)
    assert torch.equal(outputs(masked, x), outputs(sliced, x))


def test_groups_of_a_residual_block_are_printed():
    text = str(find_groups(SmallConvNet(), images()))
    rows = [line.split("  ") for line in text.splitlines()]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["3 of 4 groups can lose channels"],
        ["group", "units", "made by", "read by", "stays whole because it"],
        ["-" * 11, "-" * 5, "-" * 28, "-" * 28, "-" * 27],
        ["stem", "6", "stem", "block.conv1, block.project.0"],
        ["block.conv1", "8", "block.conv1", "block.conv2"],
        ["block.conv2", "8", "block.conv2, block.project.0", "fc"],
        ["fc", "-", "fc", "is an output of the network"],
    ]


def test_heads_go_with_their_query_key_value_and_output():
    groups = find_groups(LlamaBlock(), ids())
    heads = next(g for g in groups.prunable() if g.name.endswith("q_proj"))
    assert [layer.name.rpartition(".")[2] for layer in heads.layers] == ["q_proj", "k_proj", "v_proj"]
    assert (heads.n, heads.widths) == (3, (16, 8, 8))  # a key head and its two query heads, 8 channels each
    assert [name.rpartition(".")[2] for name in heads.readers] == ["o_proj"]
    stream = next(g for g in groups.groups if g.name.endswith("embed_tokens"))
    assert "is mixed by mean in model.model.layers.0.input_layernorm" in stream.reason


def test_the_number_of_heads_follows_in_the_module():
    net = build("vit-tiny", in_channels=3, num_classes=5, image_size=8)
    groups = find_groups(net, pictures(8).float())
    keep = groups.everything()
    keep[groups.prunable()[0].first] = False
    done = cut(net, groups, keep)
    assert done.attributes["blocks.0.attention"] == {"heads": 2} and net.blocks[0].attention.heads == 2
    assert (net.blocks[0].attention.qkv.out_features, net.blocks[0].attention.proj.in_features) == (384, 128)


def test_a_layer_that_is_called_twice_is_one_group():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))

    net = Twice()
    groups = find_groups(net, torch.randn(3, 4))
    group = groups.prunable()[0]
    assert [layer.name for layer in group.layers] == ["first", "again"]
    keep = groups.everything()
    keep[2] = False
    cut(net, groups, keep)
    assert tuple(net.again.weight.shape) == (7, 7) and net(torch.randn(3, 4)).shape == (3, 2)


def test_grouped_convs_lose_the_same_channel_of_every_group():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Flatten(), nn.Linear(12, 2))
    groups = find_groups(net, torch.randn(2, 3, 1, 1))
    assert [(g.name, g.n, g.widths) for g in groups.prunable()] == [("0", 2, (4,)), ("1", 3, (4,))]
    keep = groups.everything()
    keep[[0, 3]] = False
    cut(net, groups, keep)
    assert (net[0].out_channels, net[1].in_channels, net[1].out_channels, net[1].groups) == (4, 4, 8, 4)
    assert tuple(net[1].weight.shape) == (8, 1, 1, 1) and tuple(net[3].weight.shape) == (2, 8)


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 2))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_computed_weight() -> nn.Module:
    net = sequential(nn.ReLU())
    parametrize.register_parametrization(net[2], "weight", Call(lambda w: w - w.mean()))
    return net


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "unknown operation": (sequential(Call(lambda x: torch.fft.fft(x).real)), "no rule for the operation _fft_r2c in 1"),
    "layer norm": (sequential(nn.LayerNorm(8)), "is normalized together by native_layer_norm in 1"),
    "group norm": (sequential(nn.GroupNorm(2, 8)), "is normalized in groups by native_group_norm in 1"),
    "softmax": (sequential(nn.Softmax(-1)), "is mixed by _softmax in 1"),
    "mean": (sequential(Call(lambda x: x - x.mean(-1, keepdim=True))), "is mixed by mean in 1"),
    "constant": (sequential(Call(lambda x: x + torch.ones(8))), "is combined with something of fixed size in add in 1"),
    "written size": (sequential(Call(lambda x: x.reshape(-1, 8))), "has its size written into the model's code: shape"),
    "scale": (sequential(Call(lambda x: x / x.shape[1])), "is scaled by its size in the model's code"),
    "computed weight": (with_computed_weight(), "is mixed by mean in 2.parametrizations"),
}


@pytest.mark.parametrize("net, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_reason(net, words):
    groups = find_groups(net, torch.randn(3, 6))
    assert groups.prunable() == () and words in groups.groups[0].reason, str(groups)


class InPlace(nn.Module):
    """A conv whose output, or whose weight, is changed in place in front of the next one."""

    def __init__(self, change: Callable[[Tensor], Any], weight: Callable[[Tensor], Any] = lambda w: w) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.change, self.weight = change, weight

    def forward(self, x: Tensor) -> Tensor:
        w = self.a.weight.clone()
        self.weight(w)
        y = F.relu(self.bn(F.conv2d(x, w, self.a.bias))).clone()
        self.change(y)
        return self.b(y)


CHANGED = {  # each chooses the same units for the cut that is tried, so that only the rule tells
    "filled slice": InPlace(lambda y: y[:, :1].fill_(0)),
    "half of what there is": InPlace(lambda y: y[:, : y.shape[1] // 2].fill_(0)),
    "scaled slice": InPlace(lambda y: y[:, :1].mul_(2)),
    "assigned slice": InPlace(lambda y: operator.setitem(y, (slice(None), slice(1)), 3)),
    "one channel": InPlace(lambda y: y.select(1, 0).add_(1)),
    "slice of a view": InPlace(lambda y: y.flatten(2)[:, :1].relu_()),
    "through data": InPlace(lambda y: y.data[:, :1].zero_()),
    "slice of a weight": InPlace(lambda y: y, lambda w: w[:1].zero_()),
}


@pytest.mark.parametrize("net", CHANGED.values(), ids=CHANGED)
def test_channels_that_are_told_from_others_in_place_stay_whole(net):
    group = find_groups(randomised(net), pictures(8), prove=False).groups[0]
    assert group.name == "a" and not group.n and "has some of its channels changed in place by" in group.reason


UNIFORM = {
    "all channels": lambda y: y[:, :].mul_(2),
    "some rows": lambda y: y[:, :, :2].fill_(0),
    "one of the batch": lambda y: y[0].zero_(),
    "a view of all": lambda y: y.flatten(2).add_(1),
    "the whole": lambda y: y.relu_(),
}


@pytest.mark.parametrize("change", UNIFORM.values(), ids=UNIFORM)
def test_a_change_in_place_that_is_the_same_for_every_channel_cuts_none_off(change):
    net, x = randomised(InPlace(change)), pictures(8)
    groups = find_groups(net, x)
    assert groups.groups[0].name == "a" and groups.groups[0].n == 8
    masked, sliced = copy.deepcopy(net), copy.deepcopy(net)
    keep = some_gone(groups)
    mask(masked, groups, keep)
    cut(sliced, groups, keep)
    torch.testing.assert_close(outputs(sliced, x), outputs(masked, x))


def test_one_refusal_leaves_the_other_groups():
    net = nn.Sequential(sequential(nn.ReLU()), nn.Linear(2, 8), Call(lambda x: x.reshape(-1, 8)), nn.Linear(8, 2))
    assert [g.name for g in find_groups(net, torch.randn(3, 6)).prunable()] == ["0.0", "0.2"]


def test_channels_padded_into_a_shortcut_stay():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc((self.conv(x) + F.pad(x, (0, 0, 0, 0, 2, 2))).mean((2, 3)))

    groups = find_groups(Padded(), torch.randn(2, 3, 4, 4))
    assert [(g.name, g.n) for g in groups.groups] == [("stem", 4), ("fc", 0)]
    assert encode(next(x for x in groups.slices if x.tensor == "conv.weight" and x.dim == 0).units) == "-*2 0..3 -*2"


def test_a_branch_that_only_training_runs_is_cut_along():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc, self.aux, self.idle = (nn.Linear(n, m) for n, m in ((4, 8), (8, 2), (8, 2), (3, 3)))

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.stem(x))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    net = Auxiliary()
    groups = find_groups(net, torch.randn(3, 4))
    assert groups.prunable()[0].readers == ("fc", "aux")
    assert groups.notes == ("idle.weight, idle.bias did not run on the example inputs and keep their shapes",)


def test_finding_groups_touches_nothing():
    net = SmallConvNet().train()
    net.bn.eval()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    parameters, state = list(net.parameters()), torch.get_rng_state()
    groups = find_groups(net, images())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags and torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True)) and net.stem.out_channels == 6
    again = Groups.from_dict(groups.to_dict())
    assert str(again) == str(groups) and again.macs(again.everything()) == groups.macs(groups.everything())


def test_multiply_adds_are_those_of_the_layers():
    groups = find_groups(SmallConvNet(), images(1))
    stem, conv1, conv2, project, fc = 12 * 12 * 9 * 6, 36 * 9 * 6 * 8, 36 * 9 * 8 * 8, 36 * 6 * 8, 8 * 4
    assert groups.macs(groups.everything()) == stem + conv1 + conv2 + project + fc
    keep = groups.everything()
    keep[:3] = False  # half of the stem
    assert groups.macs(keep) == stem // 2 + conv1 // 2 + conv2 + project // 2 + fc


@pytest.mark.parametrize(
    "units, code",
    [
        ([0, 1, 2, 3], "0..3"),
        ([4, 4, 4, 5, 5, 5], "4..5*3"),
        ([FIXED, FIXED, 7, 3, 4], "-*2 7 3..4"),
        ([0, 1, 0, 1], "0..1 0..1"),
        ([], ""),
    ],
)
def test_units_are_kept_as_runs(units, code):
    assert encode(torch.tensor(units, dtype=torch.int64)) == code
    assert decode(code).tolist() == units
