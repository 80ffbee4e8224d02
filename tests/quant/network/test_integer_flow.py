"""Codes that converted layers hand to each other: the same predictions, and floats for everything else."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.demo import models
from gs_algos.quant.integer.layers import QuantizedConv
from gs_algos.quant.integer.quantized_tensor import DeferredOutput, QuantizedTensor
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.network.integer_flow import disable_int8_flow
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.scheme import Scheme
from tests.helpers import same_bits


class Chain(nn.Module):
    """Convs in a line with all that may lie between them, a branch, and a linear behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.six, self.drop = nn.ReLU6(inplace=True), nn.Dropout(0.5)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.e = nn.Conv2d(8, 4, 3, stride=2)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(4 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))  # read by b alone
        x = self.drop(self.six(self.b(x)))  # read by c and d
        x = self.c(x) + self.d(x)  # codes, on a grid that both share
        x = F.relu_(self.e(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def image(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def build() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


def converted(**options: Any) -> tuple[nn.Module, SimQAT]:
    algo = SimQAT(**{"weight": "int8@channel", "act": "int8@tensor:ema", **options})
    net = algo.apply(build(), image())
    net.train()
    for seed in range(3):
        net(image(seed))
        algo.step()
    return algo.convert(net.eval()), algo


def unlinked(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    disable_int8_flow(net, (), "")
    for module in net.modules():
        if isinstance(module, Convolution):
            module.defers_add = False
    return net


@pytest.mark.parametrize("act", ["int8@tensor:ema", "uint8@tensor:ema", "int4@tensor:ema", "int8@tensor:ema:sym"])
def test_layers_hand_codes_and_nothing_changes(act: str, tmp_path: Path):
    net, algo = converted(act=act)
    handing = {name for name, m in net.named_modules() if isinstance(m, QuantizedConv) and m._consumer_grids}
    assert handing == {"a", "b", "e"}  # c and d, which are added, have a grid of their own
    seen = {}
    for name in "abcde":
        hook = lambda _, args, y, name=name: seen.update({name: (type(args[0]), type(y))})  # noqa: E731
        net.get_submodule(name).register_forward_hook(hook)
    y = net(image(7))
    assert seen["b"] == (QuantizedTensor, QuantizedTensor)
    assert seen["c"] == seen["d"] == (QuantizedTensor, QuantizedTensor) and seen["e"][0] is DeferredOutput
    assert type(y) is Tensor and same_bits(y, unlinked(net)(image(7)))
    assert algo.summary(net).count("-> int8 for the next layer") == 3
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), build).eval()
    assert loaded.b._consumer_grids and same_bits(loaded(image(7)), y)
    assert same_bits(copy.deepcopy(net)(image(7)), y)


@torch.no_grad()
def test_a_linear_called_often_sees_changes_and_refuses_other_widths():
    fc, x = converted()[0].fc, torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    last = fc(x)
    assert same_bits(fc(x), last) and same_bits(fc(x[:1]), last[:1]) and same_bits(fc(x[None]), last[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(fc(x), last)
    for buffer in (fc.scale, fc.bias, fc.input_quantizer.scale, fc.codes):
        buffer.mul_(2)
        before, last = last, fc(x)
        assert same_bits(last, copy.deepcopy(fc)(x)) and not torch.equal(last, before)
    with pytest.raises(ValueError, match=r"qmatmul_int8: the last axis of x must be K=16 of the weight"):
        fc(x[:, :8])


@torch.no_grad()
def test_a_linear_is_a_few_python_calls():
    """What small layers take is mostly calls: checks and choices are made once, not in each of them (118 before)."""
    fc, x = converted()[0].fc, torch.ones(1, 16)
    fc(x)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        fc(x)
    finally:
        sys.setprofile(None)
    assert len(calls) < 60, calls


def test_a_compiler_sees_floats_and_gives_the_same():
    net, _ = converted()
    exported = torch.export.export(net, (image(),)).module()
    torch.testing.assert_close(exported(image(7)), net(image(7)), rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False):
        assert same_bits(net(image(7)), unlinked(net)(image(7)))


def test_grids_that_differ_stay_apart():
    algo = SimQAT(weight="int8@channel", act="int8@tensor:ema", rules=[("d", {"act": "int4@tensor:ema"})])
    net = algo.convert(algo.apply(build(), image()))
    assert not net.b._consumer_grids and net.a._consumer_grids
    net(image(7))


def grid(scheme: str, scale: float, zero: float) -> StaticQuantizer:
    made = StaticQuantizer(Scheme.parse(scheme, "act"))
    made.scale.fill_(scale)
    made.zero.fill_(zero)
    made.refresh_zero_point()
    return made


GRID = grid("int8@tensor:ema:asym", 0.05, -17)
ANYTHING = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "clamp": lambda x: F.hardtanh(x, -0.4, 1.3),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "views": lambda x: x.flatten(1).view(2, 3, -1).transpose(1, 2).reshape(2, -1)[:, 5:40].unsqueeze(0),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "concat": lambda x: torch.cat([x, F.relu(x)], 1),
    "shuffled channels": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1).unflatten(1, (3, 1)).transpose(1, 2).flatten(1, 2),
}
FLOATS = {
    "sum": lambda x: x + 1,
    "average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "averages": lambda x: F.adaptive_avg_pool2d(x, 4),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "padded average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "mean": lambda x: x.mean((2, 3)),
    "sum of all": lambda x: x.sum((2, 3)),
    "silu": F.silu,
    "product": lambda x: x.flatten(1) @ x.flatten(1).t(),
    "pair": lambda x: torch.cat([x, x.new_zeros(2, 1, 6, 6)], 1),
    "item": lambda x: torch.tensor(x.sum().item()),
    "padding": lambda x: F.pad(x, (1, 1)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*ANYTHING, *FLOATS])
def test_operations_on_codes_are_those_on_what_they_stand_for(name: str, mode: Any):
    with mode():
        check_operation(name)


def check_operation(name: str) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 3
    codes = QuantizedTensor(GRID.codes(x), GRID, torch.float32)
    assert codes.dtype == torch.float32 and torch.equal(codes.dequantize(), GRID(x))
    y = {**ANYTHING, **FLOATS}[name](codes)
    assert isinstance(y, QuantizedTensor) == (name in ANYTHING)
    if name in ANYTHING:
        assert torch.equal(y.codes, GRID.codes(ANYTHING[name](x.clone()))) and "QuantizedTensor" in repr(y)
    else:
        torch.testing.assert_close(y, FLOATS[name](GRID(x)))


@pytest.mark.parametrize("scheme", ["int8@tensor:lsq", "uint4@tensor:lsq"])
@pytest.mark.parametrize("zero", [-146, 270])
def test_a_relu_of_codes_whose_zero_point_none_of_them_is_rounds_as_the_value(scheme: str, zero: int):
    far = grid(scheme, 0.05, zero)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 3 + (8 if zero < 0 else -8)
    y = F.relu(QuantizedTensor(far.signed_codes(x)[0], far, torch.float32))
    assert torch.equal(y.codes, far.signed_codes(F.relu(x))[0])
    far.emits_int8 = True
    assert not far.returns_int8() and type(far(x)) is Tensor


def test_writing_into_codes_is_refused_and_not_lost():
    codes = QuantizedTensor(GRID.codes(torch.randn(2, 3, 6, 6)), GRID, torch.float32)
    before = codes.codes.clone()
    with pytest.raises(RuntimeError, match=r"add_.* must not write into 8-bit codes"):
        codes += 1
    assert torch.equal(codes.codes, before)


def drawn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


OTHERS = {"the same": GRID, "unsigned": grid("uint8@tensor:ema", 0.031, 90), "of 4 bits": grid("int4@tensor", 0.7, 2)}
READS = {
    "floats": lambda y: y,
    "relu": F.relu,
    "relu6 in place": lambda y: F.relu6(y, inplace=True),
    "silu": F.silu,
    "relu, twice": lambda y: F.relu(y) + y.relu(),
    "one more": lambda y: y + drawn(9, *y.shape),
    "written into": lambda y: y.mul_(2).add_(1),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("size", [(2, 3, 6, 6), (2, 16, 9, 9)])
@pytest.mark.parametrize("other", OTHERS)
def test_a_sum_of_codes_is_that_of_floats_and_gives_their_codes(other: str, size: tuple[int, ...], read: str):
    a, b = drawn(1, *size), drawn(2, *size).contiguous(memory_format=torch.channels_last)
    want = READS[read](GRID(a) + OTHERS[other](b))
    x, y = QuantizedTensor(GRID.codes(a), GRID, a.dtype), OTHERS[other].signed_codes(b)[0]
    total = x + QuantizedTensor(y, OTHERS[other], b.dtype)
    assert type(total) is DeferredOutput and "DeferredOutput" in repr(total)
    got = READS[read](total)
    for into in OTHERS.values():
        assert torch.equal(into.signed_codes(got)[0], into.signed_codes(want)[0])
    assert torch.equal(got + 0, want + 0)


@pytest.mark.parametrize("add", [lambda total, x: total + x, lambda total, x: torch.add(x, total)])
def test_a_sum_and_codes_are_added_in_the_order_they_lie_in_and_show_strides_of_floats(add: Any):
    last = drawn(1, 2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    codes = QuantizedTensor(GRID.codes(last), GRID, last.dtype, (1296, 81, 9, 1))
    got, want = add(codes + codes, codes), add(GRID(last) + GRID(last), GRID(last))
    assert type(got) is DeferredOutput and got.stride() == (1296, 81, 9, 1)
    assert got.values().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.values(), want) and torch.equal(got + 0, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_16_bits_is_rounded_as_there(dtype: torch.dtype):
    a, b = drawn(1, 2, 16, 9, 9).to(dtype), drawn(2, 2, 16, 9, 9).to(dtype)
    total = QuantizedTensor(GRID.codes(a), GRID, dtype) + QuantizedTensor(GRID.codes(b), GRID, dtype)
    want, into = GRID(a) + GRID(b), OTHERS["of 4 bits"]
    assert torch.equal(into.codes(total), into.codes(want)) and torch.equal(total + 0, want) and total.dtype == dtype


def test_codes_change_their_grid_as_floats_do():
    x = QuantizedTensor(GRID.codes(drawn(3, 2, 16, 9, 9)), GRID, torch.float32)
    for into in OTHERS.values():
        assert torch.equal(into.signed_codes(x)[0], into.signed_codes(x.dequantize())[0])
        into.emits_int8 = True
        y = into(x)
        into.emits_int8 = False
        assert type(y) is QuantizedTensor and torch.equal(y.dequantize(), into(x.dequantize()))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
@pytest.mark.parametrize("algorithm", ["simqat", "slb", "slb in floats"])
def test_known_networks_give_the_same_bits_as_without_handing(name: str, algorithm: str):
    torch.manual_seed(0)
    x = drawn(4, 2, 1, 12, 12)
    net = models.build(name, in_channels=1, num_classes=10, image_size=12).eval()
    act = {"simqat": "int8@tensor:ema", "slb": "uint8@tensor:pact", "slb in floats": None}[algorithm]
    algo: Any = SimQAT(act=act) if algorithm == "simqat" else SLB(weight="2bit@channel", act=act, total_steps=4)
    net = algo.convert(algo.apply(net, x))
    apart = unlinked(net)
    seen: list[str] = []
    for where, module in net.named_modules():
        if isinstance(module, Convolution):
            module.register_forward_hook(lambda _, __, y: seen.append(type(y).__name__))
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            seen.append(f"{where} is left")
    assert torch.equal(net(x) + 0, apart(x)) and torch.equal(net(x[:1]) + 0, apart(x[:1]))
    with torch.inference_mode():
        assert torch.equal(net(x) + 0, apart(x))
    floats = seen.count("Tensor") / 3
    if name == "resnet20" and algorithm == "simqat":
        assert floats == 0  # from the first layer to the last sum
    elif algorithm == "simqat":
        assert floats < 10  # what sums of sums read was never quantized
    convs = [m for m in net.modules() if hasattr(m, "notes")]
    fused = [m for m in convs if m.activation != "none"]
    assert [m for m in convs if " + relu" in m.path()] == fused and all(m.path() in algo.summary(net) for m in fused)


def test_the_summary_says_that_a_cpu_has_no_instructions_for_int8(monkeypatch):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    algo = SimQAT(weight="int8@channel", act="int8@tensor")
    net = algo.convert(algo.apply(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), x), x)
    for able, words in (
        (True, "integer: int8 x int8 -> int32 + relu"),
        (False, "products of 16 bits, for this CPU"),
    ):
        monkeypatch.setattr("gs_algos.quant.integer.layers.multiplies_int8", lambda able=able: able)
        assert words in algo.summary(net)


def test_codes_of_floats_are_those_of_quantize(monkeypatch):
    """Of signed and unsigned grids, with and without what the op checks and the C++ does at once."""
    x = torch.linspace(-9, 9, 2 * 3 * 5 * 7).view(2, 3, 5, 7)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for scheme, zero in (("int8@tensor", 0.0), ("uint8@tensor:asym", 77.25), ("int4@tensor:asym", -3.0)):
        quantizer = StaticQuantizer(Scheme.parse(scheme, "act"))
        quantizer.scale.fill_(0.0625)
        quantizer.zero.fill_(zero)
        quantizer.refresh_zero_point()
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:, ::2]):
            got, want = quantizer.signed_codes(image)[0], quantizer.codes(image)
            assert torch.equal(got.int() + (0 if want.dtype == torch.int8 else 128), want.int())
