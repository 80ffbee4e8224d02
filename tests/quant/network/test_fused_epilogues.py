"""What runs in a converted layer's call beside it, what does not and why, and that a forward never notices."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.export.onnx import onnx_model
from gs_algos.quant.integer.quantized_tensor import QuantizedTensor
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.scheme import Scheme
from tests.helpers import relative_rms, same_bits


def conv(inputs: int = 6) -> nn.Conv2d:
    return nn.Conv2d(inputs, 6, 3, padding=1)


class Acts(nn.Module):
    """A conv in front of each kind of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Sequential(conv(3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.six, self.hard = nn.Sequential(conv(), nn.ReLU6()), nn.Sequential(conv(), nn.Hardswish())
        self.silu, self.gelu = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.SiLU()), nn.Sequential(conv(), nn.GELU())
        self.tanh, self.hooked = nn.Sequential(conv(), nn.GELU("tanh")), nn.Sequential(conv(), nn.Hardswish())
        self.function, self.twice, self.shared, self.branch = conv(), conv(), nn.ReLU(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hooked(self.tanh(self.gelu(self.silu(self.hard(self.six(self.relu(x)))))))
        x = self.shared(self.twice(F.silu(self.function(x))))
        x = self.branch(self.shared(x))
        return F.relu(x) + x


class Sums(nn.Module):
    """Convs in front of adds of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.act = conv(3), conv(), conv(), conv(), nn.SiLU()
        self.late, self.read = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        x = F.silu(self.b(x) + x)  # in b's call, with the activation
        y = self.c(x)
        y += x  # written into
        x = self.act(x + self.d(y))  # the layer second
        shared = self.read(x)
        return x + F.relu(self.late(shared) + shared[:, :1])  # an operand that is repeated


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def converted(build: Any, act: str | None, prepare: Any = lambda net: None) -> tuple[nn.Module, Any, Tensor]:
    """The network, its algorithm, and what it gave before it was converted."""
    torch.manual_seed(0)
    net = build().eval()
    algo: Any = SimQAT(act=act) if act != "slb" else SLB(weight="4bit@channel", total_steps=4)
    net = algo.apply(net, image())
    prepare(net)
    if act == "slb":
        for _ in range(4):
            algo.step()
    want = net(image(1)).detach()
    return algo.convert(net), algo, want


@pytest.mark.parametrize("act", ["int8@tensor:ema", "uint8@tensor:ema", None, "slb"])
def test_activations_run_in_the_call_of_the_layer_or_say_why_not(act: str | None, tmp_path: Path):
    seen = []
    prepare = lambda net: net.hooked[1].register_forward_hook(lambda *_: seen.append(1))  # noqa: E731
    net, algo, want = converted(Acts, act, prepare)
    fused = {name: m.activation for name, m in net.named_modules() if isinstance(m, Convolution)}
    kinds = {"relu.0": "relu", "six.0": "relu6", "hard.0": "hardswish", "silu.0": "silu", "gelu.0": "gelu"}
    assert {name: kind for name, kind in fused.items() if kind != "none"} == kinds
    assert all(type(net.get_submodule(name)[-1]) is nn.Identity for name in ("relu", "six", "hard", "silu", "gelu"))
    assert seen and relative_rms(net(image(1)) + 0, want) < 0.02
    table = algo.summary(net)
    for reason in (
        "tanh.1 is not fused: it is approximated by tanh",
        "hooked.1 is not fused: it has hooks",
        "silu is not fused: it is a function",
        "shared is not fused: it is called 2 times",
        "relu is not fused: 2 operations read the output",
    ):
        assert reason in table, table
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), lambda: Acts().eval()).eval()
    assert same_bits(loaded(image(1)) + 0, net(image(1)) + 0)


@pytest.mark.parametrize("act", ["int8@tensor:ema", None])
def test_an_export_to_onnx_keeps_what_is_fused(act: str | None):
    net, _, want = converted(Acts, act)
    if act is None:  # what QuantizeLinear needs onnx for cannot run here
        assert relative_rms(onnx_model(net)(image(1)), want) < 1e-5
    assert [m.activation for m in onnx_model(net).modules() if hasattr(m, "before")].count("none") == 4


@pytest.mark.parametrize("act", [None, "slb"])
def test_adds_run_in_the_call_of_the_layer_or_say_why_not(act: str | None, tmp_path: Path):
    net, algo, want = converted(Sums, act)
    assert {name for name, m in net.named_modules() if getattr(m, "defers_add", False)} == {"b", "d", "late"}
    assert relative_rms(net(image(1)) + 0, want) < 1e-5
    assert "the add is not fused: it writes into an operand" in algo.summary(net)
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), lambda: Sums().eval()).eval()
    assert loaded.b.defers_add and same_bits(loaded(image(1)) + 0, net(image(1)) + 0)
    x = image(1).requires_grad_()
    net(x).sum().backward()  # nothing waits where a gradient is asked for
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_adds_with_rounded_operands_stay_apart_and_say_so():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3), conv(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    net, algo, want = converted(Joined, "int8@tensor:ema")
    assert relative_rms(net(image(1)) + 0, want) < 0.02
    assert "the add is not fused: its operands are rounded first" in algo.summary(net)


class Overwrites(nn.Module):
    """Writes into what the conv reads before its result is used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = conv(3), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.conv(x)
        x.mul_(-3)
        return self.out(y + x.repeat(1, 2, 1, 1))


def test_what_would_read_an_overwritten_input_is_found_and_runs_at_once(caplog: pytest.LogCaptureFixture):
    net, algo, want = converted(Overwrites, None)
    assert not net.conv.defers_add and "adds run apart: outputs would change" in caplog.text
    assert relative_rms(net(image(1)), want) < 1e-5
    assert "hands on floats, at once: outputs would change" in algo.summary(net)


def test_a_copy_is_linked_to_itself():
    net, _, _ = converted(Sums, "int8@tensor:ema")
    twin = copy.deepcopy(net)
    assert same_bits(twin(image(1)) + 0, net(image(1)) + 0)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, Convolution):
                module.input_quantizer.scale.mul_(2)
    assert not torch.equal(twin(image(1)) + 0, net(image(1)) + 0)


def test_a_layer_called_often_gives_the_same_bits_and_sees_changes():
    net, _, _ = converted(Acts, "int8@tensor:ema")
    first = net(image(1)) + 0
    for _ in range(40):  # past the calls after which small layers are compiled
        last = net(image(1)) + 0
    assert same_bits(first, last)
    assert same_bits(net(image(1)[:1]) + 0, first[:1])
    with torch.no_grad():
        net.relu[0].bias.add_(1)
    assert not torch.equal(net(image(1)) + 0, first)


@pytest.mark.parametrize("leaves", ["numpy", "tolist", "array", "dlpack", "copy", "pickle"])
def test_what_leaves_pytorch_is_a_plain_tensor(leaves: str):
    """Codes and waiting results, as a hook sees them, in the hands of other libraries."""
    quantizer = StaticQuantizer(Scheme.parse("int8@tensor", "act"))
    codes = torch.arange(-4, 4, dtype=torch.int8).view(2, 4)
    handed = QuantizedTensor(codes, quantizer, torch.float32)
    for tensor, want in ((handed, codes.float()), (handed + handed, 2 * codes.float())):
        assert type(tensor) is not Tensor
        if leaves == "tolist":
            got: Any = torch.tensor(tensor.tolist())
        elif leaves == "pickle":
            file = io.BytesIO()
            torch.save(tensor, file)
            file.seek(0)
            got = torch.load(file, weights_only=True)
        else:
            take: dict[str, Any] = {"array": np.asarray, "dlpack": torch.from_dlpack, "copy": copy.deepcopy}
            got = torch.as_tensor(take.get(leaves, lambda t: t.numpy())(tensor))
        assert type(got) is Tensor and torch.equal(got, want)
    with pytest.raises(RuntimeError, match="a tensor with memory is needed"):
        handed.data_ptr()
