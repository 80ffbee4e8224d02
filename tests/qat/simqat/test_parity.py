"""A converted network equals the trained one, for every scheme, fold mode and observer; and it survives a save."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SimQAT
from gs_algos.core.modules import get_module
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer
from gs_algos.quant.integer.layers import INTEGER, WITHOUT_VNNI, QuantizedConv, QuantizedLayer, QuantizedLinear
from gs_algos.quant.scheme import Scheme
from gs_kernels import fake_quant
from gs_kernels.runtime.instructions import multiplies_int8
from tests.nets.convolutional import SmallConvNet, images, mlp, train

WEIGHTS = (
    "int8@channel",
    "int8@tensor:narrow",
    "uint4@channel:asym",
    "int4@channel:mse",
    "int2@channel:lsq",
    "int1@channel",
    "int3@channel:percentile=99",
)
ACTS = (
    "int8@tensor:ema",
    "uint8@tensor:minmax",
    "int4@tensor:lsq",
    "int8@tensor:percentile",
    "int1@tensor:sym:mse",
    None,
)


def trained(seed: int = 0, **options) -> tuple[nn.Module, SimQAT]:
    torch.manual_seed(seed)
    net = SmallConvNet()
    algo = SimQAT(**options)
    net = algo.apply(net, images())
    train(net, algo)
    return net.eval(), algo


@torch.no_grad()
def outputs(net: nn.Module, seed: int = 7) -> torch.Tensor:
    return net(images(16, seed=seed))


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_converted_is_trained_bit_for_bit_for_every_weight_scheme(weight, fold):
    net, algo = trained(weight=weight, fold_bn=fold)
    want = outputs(net)
    assert torch.equal(outputs(algo.convert(net)), want)
    assert algo.parity.layer_error == algo.parity.output_error == 0


@pytest.mark.parametrize("act", ACTS)
def test_converted_is_trained_bit_for_bit_for_every_activation_scheme(act):
    net, algo = trained(act=act)
    want = outputs(net)
    algo_net = algo.convert(net)
    if act is None or "int1" in act:  # products of floats: up to the order of their sums
        torch.testing.assert_close(outputs(algo_net), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        assert algo.parity.layer_error < 1e-5
    else:
        assert torch.equal(outputs(algo_net), want)
    assert all(isinstance(get_module(algo_net, n), QuantizedLayer) for n in ("stem", "block.conv1", "fc"))


def test_codes_are_exactly_those_of_the_trained_forward():
    net, algo = trained(weight="int4@channel", fold_bn="two_conv")
    layer = net.block.conv2
    want = layer.weight_quantizer(layer.folded_weight()).detach()
    net = algo.convert(net)
    converted = net.block.conv2
    assert converted.codes.dtype == torch.uint8 and converted.codes.shape == (8, 8 * 9 // 2)
    assert torch.equal(converted.weight, want)


class Eight(nn.Module):
    """Small networks side by side, each with inputs of its own: planned once, they are quantized in eight widths."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)])


def test_two_hundred_networks_convert_to_the_same_function():
    widths = [(f"re:nets.{i}.*", {"weight": f"int{1 + i}@channel"}) for i in range(8)]
    for seed in range(25):
        torch.manual_seed(seed)
        x = torch.randn(4, 8, 6)
        algo = SimQAT(weight="int8@channel", act="int8@tensor:minmax", rules=widths)
        net = algo.apply(Eight().eval(), x)
        with torch.no_grad():
            want = net(x)
            assert torch.equal(algo.convert(net)(x), want), seed


def test_int8_linear_runs_on_integers_and_says_so():
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    algo = SimQAT()
    net = algo.apply(mlp(), x)
    net = algo.convert(net.eval())
    assert net[0].path() == "integer: int8 x int8 -> int32"
    assert "integer: int8 x int8 -> int32" in algo.summary(net)
    assert not any(p.is_floating_point() and p.numel() > 64 for p in net.state_dict().values())


def test_convolutions_run_on_integers_and_say_where_they_cannot():
    net, algo = trained()
    net = algo.convert(net)
    assert isinstance(net.stem, QuantizedConv) and net.stem.path().startswith(
        INTEGER if multiplies_int8() else WITHOUT_VNNI
    )
    net, algo = trained(weight="int4@group:9", rules=[("re:.*project.*", {"weight": "int4@channel"}), ("fc", None)])
    net = algo.convert(net)
    assert net.block.conv1.path() == "dequantizes: a filter has several scales + relu"
    net, algo = trained(act=None)
    net = algo.convert(net)
    assert net.stem.path() == "float x packed codes: activations are not quantized"


def test_groups_of_a_conv_run_along_its_flattened_inputs():
    net, algo = trained(weight="int4@group:9", rules=[("re:.*project.*", {"weight": "int4@channel"}), ("fc", None)])
    assert net.block.conv1.weight_quantizer.scale.numel() == 8 * 6
    net = algo.convert(net)
    assert net.block.conv1.scale.shape == (8, 6)


def test_negative_and_zero_gamma_convert_exactly():
    for fold in ("none", "one_conv", "two_conv"):
        torch.manual_seed(1)
        net = SmallConvNet()
        with torch.no_grad():
            net.bn.weight.copy_(torch.tensor([-1.5, 0.0, 1e-9, 0.5, -1e-9, 2.0]))
        algo = SimQAT(fold_bn=fold)
        net = algo.apply(net, images()).eval()
        want = net(images(seed=3)).detach()
        got = algo.convert(net)(images(seed=3))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_zero_gamma_still_learns():
    for fold in ("one_conv", "two_conv"):
        net = SmallConvNet()
        nn.init.zeros_(net.block.bn2.weight)
        algo = SimQAT(fold_bn=fold)
        net = algo.apply(net, images()).train()
        net(images()).square().sum().backward()
        assert float(net.block.bn2.weight.grad.abs().max()) > 0, fold


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_saved_and_loaded_network_is_bit_equal(stage, tmp_path):
    net, algo = trained(weight="int4@channel:lsq", fold_bn="two_conv", freeze_bn=2, quant_delay=1)
    if stage == "converted":
        net = algo.convert(net)
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, SmallConvNet).eval()
    assert torch.equal(again(images(seed=5)), net(images(seed=5)))
    assert again.state_dict().keys() == net.state_dict().keys()


def test_resumed_training_goes_on_exactly(tmp_path):
    net, algo = trained(quant_delay=4, freeze_bn=5)
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, SmallConvNet)
    resumed = SimQAT.resume(again)
    assert resumed.steps == algo.steps == 3
    train(net, algo, steps=4)
    train(again, resumed, steps=4)
    for key, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_deep_copies_are_independent():
    net, algo = trained()
    before = copy.deepcopy(net)
    assert before.stem.batch_norm() is before.bn
    train(net, algo, steps=1)
    assert not torch.equal(before.stem.weight, net.stem.weight)


def test_operands_of_an_add_share_one_scale():
    net, algo = trained()
    assert net.block.bn2.output_quantizer is net.block.project[1].output_quantizer
    net = algo.convert(net)
    assert torch.equal(net.block.conv2.output_quantizer.scale, net.block.project[0].output_quantizer.scale)


@pytest.mark.parametrize("act", ["int8@tensor:lsq", "uint8@tensor:lsq", "int4@tensor:lsq"])
@pytest.mark.parametrize("zero", [-146.3, 300.4])
def test_convolutions_whose_learnt_zero_point_no_code_is_multiply_floats(tmp_path, act, zero):
    net, algo = trained(act=act)
    for module in net.modules():
        if isinstance(module, ActivationQuantizer):
            with torch.no_grad():
                module.zero.fill_(zero)
    want = net(images(16, seed=7)).detach()
    net = algo.convert(net)
    assert algo.parity.layer_error < 1e-5
    torch.testing.assert_close(net(images(16, seed=7)), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert net.stem.path().startswith("float x packed codes: no 8-bit code is the zero point of its activations")
    assert net.fc.path() == "integer: int8 x int8 -> int32"  # nothing pads it
    assert not any(isinstance(m, QuantizedConv) and (m._consumer_grids or m._emits_own_grid()) for m in net.modules())
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, SmallConvNet).eval()
    assert again.stem.path() == net.stem.path()
    assert torch.equal(again(images(seed=5)), net(images(seed=5)))


def test_a_learnt_step_quantizes_as_it_is_stored():
    """On the edge of two codes the last place of the step decides, and the converted layer has the stored one."""
    quantizer = ActivationQuantizer(Scheme.parse("int8@tensor:lsq", "act"), torch.device("cpu"))
    for seed in range(200):
        step = torch.rand(1, generator=torch.Generator().manual_seed(seed)) + 0.01
        with torch.no_grad():
            quantizer.scale.copy_(step)
            quantizer.zero.fill_(seed % 20 - 9.7)
        scale, zero = quantizer.grid()
        x = torch.arange(-100, 100).add(0.5) * step
        assert torch.equal(quantizer(x), fake_quant(x, scale, zero, qmin=-128, qmax=127)), seed


def test_without_fusion_outputs_are_quantized_right_behind_each_layer():
    net, algo = trained(fusion=False, fold_bn=False)
    assert net.stem.input_quantizer is None
    assert net.stem.output_quantizer is not None
    net = algo.convert(net)
    assert isinstance(net.bn, nn.BatchNorm2d)
    assert algo.parity.layer_error < 0.05


def test_bfloat16_network_converts():
    torch.manual_seed(0)
    net = mlp().bfloat16()
    x = torch.randn(8, 16).bfloat16()
    algo = SimQAT()
    net = algo.convert(algo.apply(net, x).eval())
    assert net(x).dtype == torch.bfloat16
    assert isinstance(net[0], QuantizedLinear) and net[0].scale.dtype == torch.float32
