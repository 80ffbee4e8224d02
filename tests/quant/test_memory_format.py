"""Trained and converted layers give tensors the strides that the float network's have, so that `.view` works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SLB, SimQAT
from gs_algos.quant.integer.quantized_tensor import DeferredOutput, QuantizedTensor
from gs_algos.quant.memory_format import laid, strides_in, suggested
from tests.helpers import relative_rms


class Vision(nn.Module):
    """Code of all kinds that looks at strides, between and behind layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.shuffled, self.act = nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1)
        self.last, self.fc = nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6 * 2 * 2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        b, c, h, w = x.shape
        x = self.left(x) + self.right(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.view(b, c, -1).mean(2))))).view(b, c, 1, 1)
        x = (x * gate).view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        x = self.act(self.shuffled(x))
        maps = self.last(x)
        return self.fc(F.max_pool2d(maps, 2).view(b, -1)), maps


class Sounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x.view(-1, *x.shape[1:])).view(x.size(0), -1)


class Videos(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv3d(2, 4, 3, padding=1), nn.Linear(4 * 27, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(x)).view(x.size(0), -1))


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "vision": (Vision, drawn(2, 3, 10, 10)),
    "sounds": (Sounds, drawn(3, 2, 12)),
    "videos": (Videos, drawn(2, 2, 3, 3, 3)),
}
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "8 bits": lambda: SimQAT(),
    "unsigned, two convs": lambda: SimQAT(act="uint8@tensor:ema", fold_bn="two_conv"),
    "weights alone": lambda: SimQAT(act=None),
    "apart": lambda: SimQAT(fusion=False, fold_bn=False),
    "searched": lambda: SLB(weight="2bit@channel", total_steps=2),
    "searched, 8 bits": lambda: SLB(weight="4bit@channel", act="int8@tensor:ema", total_steps=2),
}


def tensors(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


@torch.no_grad()
def seen(net: nn.Module, x: Tensor) -> tuple[dict[str, list[Any]], list[Tensor]]:
    """The strides of what each module gives, and the outputs."""
    found: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        return lambda _, __, y: found.update({name: [t.stride() for t in tensors(y)]})

    handles = [module.register_forward_hook(note(name)) for name, module in net.named_modules()]
    y = tensors(net(x))
    for handle in handles:
        handle.remove()
    return found, y


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_module_gives_the_strides_that_it_gives_in_the_float_network(network: str, algorithm: str):
    build, x = NETWORKS[network]
    torch.manual_seed(0)
    net = build()
    floats, _ = seen(copy.deepcopy(net).eval(), x)
    algo = ALGORITHMS[algorithm]()
    net = algo.apply(net, x)
    for _ in range(2):
        sum(t.square().mean() for t in tensors(net.train()(x))).backward()
        algo.step()
    trained, want = seen(net.eval(), x)
    algo.convert(net)
    converted, _ = seen(net, x)
    with torch.no_grad():
        got = tensors(net(x))
    for strides in (trained, converted):
        assert {name: strides[name] for name in floats if name in strides} == floats
    for a, b in zip(got, want, strict=True):
        assert type(a) is Tensor and relative_rms(a, b) < 1e-5
        assert a.numpy().strides == tuple(4 * n for n in a.stride()) and a.view(-1).numel() == a.numel()


@pytest.mark.parametrize("which", ["image", "weights", "both"])
def test_channels_last_stays_channels_last(which: str):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), drawn(2, 3, 8, 8)
    x = x if which == "weights" else x.contiguous(memory_format=torch.channels_last)
    net = net if which == "image" else net.to(memory_format=torch.channels_last)
    want = net(x).stride()
    algo = SimQAT()
    net = algo.convert(algo.apply(net, x).eval())
    y = net(x)
    assert y.stride() == want and y.is_contiguous(memory_format=torch.channels_last)
    assert copy.deepcopy(net).to("cpu")(x).stride() == want


def test_a_converted_network_is_made_channels_last_as_a_float_one_is():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), drawn(2, 3, 8, 8)
    algo = SimQAT()
    net = algo.convert(algo.apply(net, x).eval())
    first = net(x)
    last = net.to(memory_format=torch.channels_last)(x)
    assert first.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last) and torch.equal(first, last)
    assert net.double().float()(x).stride() == last.stride()
    assert net.to(memory_format=torch.contiguous_format)(x).stride() == first.stride()


@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()])
@pytest.mark.parametrize("act", ["int8@tensor:ema", None])
def test_a_sum_that_the_network_returns_is_a_plain_tensor(act: str | None, behind: nn.Module):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.behind = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), behind

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self.a(x) + self.b(x))

    torch.manual_seed(0)
    x, algo = drawn(2, 3, 8, 8), SimQAT(act=act)
    net = algo.convert(algo.apply(Sum(), x).eval())
    y = net(x)
    assert type(y) is Tensor and y.data_ptr() != 0 and y.is_contiguous()


def test_what_lies_in_another_order_is_laid_out_for_whoever_reads_it_and_not_for_layers():
    x = drawn(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    waiting = DeferredOutput.of(last, x.stride())
    assert waiting.stride() == x.stride() and waiting.values() is last
    assert torch.equal(waiting.view(2, -1), x.view(2, -1)) and waiting.values().stride() == x.stride()
    waiting.view(-1)[:3] = 7.0
    assert waiting.flatten()[:3].tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_strides_are_those_of_torch(size: tuple[int, ...], format: torch.memory_format):
    want = torch.empty(size, memory_format=format)
    assert strides_in(size, format) == want.stride()
    other = drawn(*size).transpose(1, 3).contiguous().transpose(1, 3)
    got = laid(other, want.stride())
    assert got.stride() == want.stride() and torch.equal(got, other)
    if want.numel():
        y = F.conv2d(want, torch.zeros(2, size[1], 3, 3), padding=2)
        assert y.stride() == strides_in(y.shape, suggested(want.shape, want.stride())) or 1 in size


def test_codes_of_another_order_concatenate_and_pool_as_their_values_do():
    x = drawn(2, 3, 6, 6)
    algo = SimQAT()
    grid = algo.convert(algo.apply(nn.Sequential(nn.Conv2d(3, 2, 1)), x).eval())[0].input_quantizer
    last = x.contiguous(memory_format=torch.channels_last)
    codes = QuantizedTensor(grid.signed_codes(last)[0], grid, x.dtype, x.stride())
    want = grid(x)
    for read in (
        lambda t: t.flatten(1),
        lambda t: F.max_pool2d(t, 2).view(2, -1),
        lambda t: torch.cat([t, F.relu(t)], 1).view(2, -1),
        lambda t: t.mean((2, 3)),
        lambda t: t.transpose(1, 2).reshape(2, -1),
        lambda t: F.relu6(t).clone().permute(0, 2, 3, 1),
    ):
        torch.testing.assert_close(read(codes) + 0, read(want))
        assert read(codes).stride() == read(want).stride()
