"""Whole architectures go through plan, apply, a step and convert; what cannot be quantized is a line of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gs_algos import SimQAT
from gs_algos.fx.op_names import SITES
from gs_algos.quant.integer.layers import QuantizedLayer
from tests.nets.graphs import Chain, Opaque, ParallelBranches, image, trained
from tests.nets.transformers_models import tiny


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """MobileNetV3: expand, depthwise, squeeze and excite, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Chain(conv=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), bn=nn.BatchNorm2d(8, eps=1e-3))
        self.expand = Chain(
            conv=nn.Conv2d(8, 16, 1, bias=False), bn=nn.BatchNorm2d(16, momentum=0.01), act=nn.Hardswish()
        )
        self.depthwise = Chain(conv=nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False), bn=nn.BatchNorm2d(16))
        self.excite = SqueezeExcite(16)
        self.project = Chain(conv=nn.Conv2d(16, 8, 1, bias=False), bn=nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x), inplace=True)
        x = x + self.project(self.excite(F.relu6(self.depthwise(self.expand(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """DenseNet: batch norm in front of the conv, everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * i) for i in (1, 2, 3))
        self.convs = nn.ModuleList(nn.Conv2d(4 * i, 4, 3, padding=1, bias=False) for i in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1).mean((2, 3))


def one_step(net: nn.Module, algo: SimQAT, inputs: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    output = net.train()(**inputs) if isinstance(inputs, dict) else net.train()(inputs)
    torch.stack([t.square().mean() for t in tree_leaves(output) if isinstance(t, Tensor)]).sum().backward()
    optimizer.step()
    algo.step()


def goes_all_the_way(net: nn.Module, inputs: Any, kept: dict[str, str], **options: Any) -> nn.Module:
    """kept: how each layer that stays float begins, and words of the reason why."""
    names = [name for name, module in net.named_modules() if isinstance(module, SITES)]
    parameters = dict(net.named_parameters())
    algo = SimQAT(**options)
    rows = {row.site: row for row in algo.plan(net, inputs).rows}
    float_layers = {name: rows[name].reason for name in names if rows[name].action == "keep"}
    assert float_layers.keys() == {name for name in names if name.startswith(tuple(kept))}
    assert all(
        any(name.startswith(n) and words in why for n, words in kept.items()) for name, why in float_layers.items()
    )
    algo.apply(net, inputs)
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())
    one_step(net, algo, inputs)
    algo.convert(net.eval())
    assert sum(isinstance(module, QuantizedLayer) for module in net.modules()) == len(names) - len(float_layers)
    assert (
        algo.parity.layer_error < 1e-7 and algo.parity.output_error == 0
    )  # a smooth activation is off by its last place
    return net


TRANSFORMERS: dict[str, dict[str, str]] = {
    "LlamaConfig": {},
    "BertConfig": {},
    "AlbertConfig": {"encoder.albert_layer_groups": "called 2 times"},
    "ViTConfig": {},
    "WhisperConfig": {},
    "T5Config": {},
    "ConvNextConfig": {},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_goes_all_the_way(name):
    torch.manual_seed(0)
    net, inputs = tiny(name)
    goes_all_the_way(net, inputs, TRANSFORMERS[name], weight="int8@channel", act="int8@tensor:ema")


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
@pytest.mark.parametrize("net", [Inverted, Dense, ParallelBranches, Opaque])
def test_a_vision_net_goes_all_the_way(net, fold):
    torch.manual_seed(0)
    net = trained(net()).train()
    goes_all_the_way(net, image(4 if isinstance(net, ParallelBranches) else 3), {}, weight="int8@channel", fold_bn=fold)


class Padded(nn.Module):
    """Reads the geometry of its layers in forward, as Whisper and MobileNetV2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2, dilation=2, groups=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        assert isinstance(conv.padding, tuple) and (conv.in_channels, conv.out_channels) == (3, self.fc.in_features)
        pad = conv.dilation[0] * (conv.kernel_size[0] - 1) - conv.stride[0] * conv.groups + self.fc.out_features
        return self.fc(conv(F.pad(x, [pad, 0, pad, 0])).mean((2, 3)))


def test_a_converted_layer_keeps_the_geometry_that_a_forward_may_read():
    goes_all_the_way(Padded(), image(), {})


class Result:
    """An output class that nobody has told PyTorch of."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Unfaithful(nn.Module):
    """Gives something else once its layer has been converted."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Result:
        return Result(self.fc(x) + (not isinstance(self.fc, nn.Linear)))


def test_an_output_of_an_unknown_class_is_compared_all_the_same():
    net, x, algo = Unfaithful(), torch.randn(4, 6), SimQAT()
    algo.apply(net, x)
    with pytest.raises(RuntimeError, match=r"the network must give the trained output within 0\.05 relative RMS, got"):
        algo.convert(net)
    assert isinstance(net.fc, nn.Linear)


class Chaotic(nn.Module):
    """Blows the last place of its layer up to all of its output, as the steps of a deep quantized network do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(64, 64), nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e7 * self.bn(self.fc(x)))


def test_a_network_is_held_to_what_its_own_last_place_does_to_it():
    torch.manual_seed(0)
    net, x, algo = Chaotic(), torch.randn(16, 64), SimQAT(act=None)
    algo.convert(algo.apply(net, x))
    assert algo.parity.layer_error < 1e-5 and algo.parity.output_error > 0.05
