"""What a trained layer becomes: codes packed at their width, in memory and on disk, that no cast spoils."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import SimQAT
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLinear
from gs_algos.quant.packed import module as packed_module
from gs_kernels import unpack_codes
from tests.helpers import relative_rms, same_bits


def image(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    ).eval()


def converted(**options: Any) -> tuple[nn.Module, Tensor]:
    """The network and what it gave before it was converted."""
    algo = SimQAT(**options)
    net = algo.apply(build(), image())
    with torch.no_grad():
        want = net(image(1))
    return algo.convert(net), want


@pytest.mark.parametrize(
    ("weight", "codes"),
    [
        ("int8@channel", 27),
        ("int4@channel", 14),
        ("int2@channel", 7),
        ("int1@channel", 4),
        ("int3@channel", 14),
        ("int5@tensor", 27),
        ("uint4@channel:asym", 14),
        ("int4@group:9:asym", 14),
    ],
)
def test_codes_take_the_bytes_of_their_width(weight: str, codes: int, tmp_path: Path):
    net, want = converted(weight=weight, rules=[("4", None)])
    conv = net[0]
    assert isinstance(conv, QuantizedConv)
    assert (conv.codes.dtype, conv.codes.shape) == (torch.uint8, (8, codes))
    assert relative_rms(net(image(1)), want) < 1e-5
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), build)
    assert all(same_bits(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert same_bits(loaded(image(1)), net(image(1)))


def test_codes_of_a_width_between_lie_in_the_next():
    net, _ = converted(weight="int3@channel", rules=[("4", None)])
    codes = unpack_codes(net[0].codes, 4, (8, 27))
    assert (int(codes.min()), int(codes.max())) == (4, 11)  # -4..3, stored from 0 upwards


@pytest.mark.parametrize("act", ["int8@tensor:ema", "int8@tensor:ema:sym", "uint8@tensor:ema", None])
@pytest.mark.parametrize("weight", ["int8@channel", "int4@group:64:asym", "uint4@channel:asym", "int1@tensor"])
def test_linear_gives_the_trained_output_in_either_layout(
    weight: str, act: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    net, want = converted(weight=weight, act=act, rules=[("0", None)])
    assert isinstance(net[4], QuantizedLinear)
    assert relative_rms(net(image(1)), want) < 1e-5
    gs_algos.save(net, tmp_path)
    monkeypatch.setattr(packed_module, "KERNEL_DEVICES", ("cpu",))
    planar = gs_algos.load(tmp_path, build)
    assert planar[4].codes.dtype == torch.int16
    assert all(same_bits(a, b) for a, b in zip(planar.state_dict().values(), net.state_dict().values(), strict=True))
    assert relative_rms(planar(image(1)), want) < 1e-5


def test_a_cast_leaves_codes_scales_zeros_and_biases_as_they_were_trained():
    net, _ = converted(weight="int4@channel:asym")
    before = {name: t.clone() for name, t in net.state_dict().items() if ".codes" in name or t.is_floating_point()}
    net.half().float()
    after = net.state_dict()
    assert all(same_bits(t, after[name]) for name, t in before.items())
    assert net.bfloat16()(image().bfloat16()).dtype == torch.bfloat16


CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 4, 3, padding=1),
    "strided and dilated": nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), bias=False),
    "of groups": nn.Conv2d(6, 4, 3, groups=2, padding="same"),
    "depthwise": nn.Conv2d(6, 6, 5, groups=6, padding=2, padding_mode="reflect"),
    "pointwise": nn.Conv2d(6, 8, 1),
    "of sequences": nn.Conv1d(6, 4, 4, stride=2, padding=1, groups=2),
    "of sequences, same": nn.Conv1d(6, 4, 4, padding="same", padding_mode="circular"),
    "of volumes": nn.Conv3d(6, 4, 2),
}


@pytest.mark.parametrize("act", ["int8@tensor:ema", "uint8@tensor:ema:asym", "int4@tensor:ema:sym", None])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_give_the_trained_output_in_either_layout(
    kind: str, act: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    conv = CONVOLUTIONS[kind]
    x, other = (torch.randn(2, 6, *[9] * (conv.weight.dim() - 2)) + 0.5 for _ in range(2))
    algo = SimQAT(weight="int4@channel", act=act)
    net = algo.apply(nn.Sequential(copy.deepcopy(conv)), x).eval()
    want = net(other).detach()
    net = algo.convert(net)
    assert isinstance(net[0], QuantizedConv) and net[0].weight.shape == conv.weight.shape
    assert net[0].path().startswith("integer") == (act is not None and kind != "of volumes")
    assert relative_rms(net(other), want) < 1e-5
    assert relative_rms(net(other[0]), want[0]) < 1e-5  # without a batch, as nn.Conv2d takes it
    gs_algos.save(net, tmp_path)
    monkeypatch.setattr(packed_module, "KERNEL_DEVICES", ("cpu",))
    planar = gs_algos.load(tmp_path, lambda: nn.Sequential(copy.deepcopy(conv)))
    assert planar[0].codes.dtype == torch.int16
    assert relative_rms(planar.eval()(other), want) < 1e-5


@pytest.mark.parametrize("site", ["0", "4"])
def test_hooks_act_on_the_converted_layer_and_their_handles_remove_them(site: str):
    net, calls = build(), []
    net.get_submodule(site).register_forward_pre_hook(lambda m, args: calls.append("in"))
    handle = net.get_submodule(site).register_forward_hook(lambda m, args, y: calls.append("out") or y * 3)
    algo = SimQAT()
    net = algo.apply(net, image())
    with torch.no_grad():
        want = net(image(1))
        net = algo.convert(net)
        calls.clear()
        assert relative_rms(net(image(1)), want) < 1e-5 and calls == ["in", "out"]
        handle.remove()
        assert relative_rms(net(image(1)), want) > 0.5


def test_a_hook_in_front_of_a_batch_norm_keeps_it_from_being_folded():
    net = build()
    net[1].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    algo = SimQAT()
    net = algo.apply(net, image())
    with torch.no_grad():
        want = net(image(1))
        assert relative_rms(algo.convert(net)(image(1)), want) < 1e-5
    assert isinstance(net[1], nn.BatchNorm2d)


def test_layers_are_called_by_keyword_before_and_after():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.conv(input=x).mean((2, 3)))

    algo = SimQAT()
    net = algo.apply(Keyword(), image()).eval()
    with torch.no_grad():
        want = net(image(1))
        assert relative_rms(algo.convert(net)(image(1)), want) < 1e-5
