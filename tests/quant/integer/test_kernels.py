"""Converted networks whose integers Triton's kernels multiply: the bits of a CPU, and nothing that waits for a value.

Runs on a GPU where there is one, and with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gs_algos import SimQAT
from gs_algos.quant.integer.layers import QuantizedLayer
from gs_algos.quant.integer.quantized_tensor import QuantizedTensor
from gs_kernels import aot
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, same_bits


class Residual(nn.Module):
    """As ResNet-20: a stem, a block with an add, one with a stride and a projection, pools, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.project, self.fc = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = F.relu(self.d(F.relu(self.c(x))) + self.project(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1), 1))


class Inverted(nn.Module):
    """As MobileNetV2: expansion, depthwise, projection, an add; branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 24, 1)
        self.depthwise, self.project = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last, self.fc = nn.Conv2d(16, 12, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x))))) + x
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(F.hardswish(self.last(x)).mean((2, 3)))


class MLP(nn.Module):
    """As a layer of Llama: gate, up and down, behind a norm, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(48)
        self.gate, self.up = nn.Linear(48, 160, bias=False), nn.Linear(48, 160, bias=False)
        self.down = nn.Linear(160, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.relu(self.gate(h)) * self.up(h))


class CopiesRefused(TorchFunctionMode):
    """Refuses functions that make a tensor of Python numbers, or move one: on a GPU each is a copy that waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("tensor", "as_tensor", "from_numpy", "cpu", "cuda", "item", "tolist", "equal"), name
        return func(*args, **(kwargs or {}))


INPUTS = {Residual: (2, 3, 10, 10), Inverted: (2, 3, 10, 10), MLP: (2, 5, 48)}


def drawn(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def cpu() -> Iterator[None]:
    """Everything inside runs as on a CPU, also in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gs_kernels.runtime.dispatch.INTERPRET", False)
        yield


@cpu()
def converted(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, SimQAT]:
    torch.manual_seed(0)
    algo = SimQAT(**{"weight": "int8@channel", "act": "int8@tensor:ema", **options})
    net = algo.apply(kind().eval(), drawn(INPUTS[kind], 0))
    net.train()
    for seed in range(2):
        net(drawn(INPUTS[kind], seed))
        algo.step()
    return algo.convert(net.eval()), algo


KERNELS = {
    Residual: {"_qconv2d_int8_kernel", "_qmatmul_int8_kernel", "_requantize_kernel"},
    Inverted: {"_qconv2d_int8_kernel", "_depthwise_kernel", "_qmatmul_int8_kernel", "_requantize_kernel"},
    MLP: {"_qmatmul_int8_kernel"},
}
SETTINGS = {
    "w8a8": {},
    "unsigned": {"act": "uint8@tensor:ema"},
    "w4a8": {"weight": "int4@channel", "act": "int8@tensor:ema:sym"},
    "a4": {"act": "int4@tensor:ema"},
}
CASES = [(kind, name) for kind in INPUTS for name in SETTINGS if kind is not Residual or name in ("w8a8", "a4")]


def inputs_of_layers(net: nn.Module) -> list[type]:
    """The types of what layers are given, as they will be called."""
    seen: list[type] = []
    for module in net.modules():
        if isinstance(module, QuantizedLayer):
            module.register_forward_hook(lambda _, args, y: seen.append(type(args[0])))
    return seen


@torch.no_grad()
@pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRET, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind, name", CASES)
def test_kernels_give_the_bits_of_a_cpu_and_hand_on_the_same_codes(kind: type[nn.Module], name: str, monkeypatch):
    net, _ = converted(kind, **SETTINGS[name])
    x, ran = drawn(INPUTS[kind], 7), []
    other = copy.deepcopy(net)
    given = inputs_of_layers(net)
    with cpu():
        want = net(x)
    for op in ("qconv2d", "qmatmul"):
        module = importlib.import_module(f"gs_kernels.{op}.kernel")
        run = getattr(module, f"{op}_int8_triton")
        monkeypatch.setattr(module, f"{op}_int8_triton", lambda *args, run=run: ran.append(run) or run(*args))
    other, given_there = other.to(DEVICE), inputs_of_layers(other)
    got = other(x.to(DEVICE))
    assert same_bits(got.cpu() + 0, want) and given_there == given and len(ran) == len(given)
    assert QuantizedTensor in given or kind is MLP


@torch.no_grad()
@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels cannot be specialised in this process")
@pytest.mark.parametrize("kind", INPUTS)
def test_a_forward_on_a_gpu_reads_no_value_and_copies_nothing_from_the_cpu(kind: type[nn.Module], monkeypatch):
    """Meta tensors have no values to read: so nothing waits for the GPU, and a CUDA graph can record it."""
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")
    monkeypatch.setattr("gs_algos.quant.packed.module.KERNEL_DEVICES", ("cpu", "meta"))
    net, _ = converted(kind)
    net, x = copy.deepcopy(net).to("meta"), torch.empty(INPUTS[kind], device="meta")
    with aot.collect_launches("sm_90"), monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda a, b: True)  # a first call compares the grids of what is concatenated
        net(x)
    with aot.collect_launches("sm_90") as kernels, CopiesRefused():
        y = net(x)
    assert y.is_meta and KERNELS[kind] <= {kernel.name for kernel in kernels}
    assert not {kernel.name for kernel in kernels} & {"_qconv2d_kernel", "_qmatmul_kernel", "_dequantize_kernel"}
