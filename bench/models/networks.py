"""Defines the networks that are measured, with random weights: times do not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gs_algos.demo.models import build


class Residual(nn.Module):
    """Computes y = relu(body(x) + shortcut(x)). Bodies add little: else 50 random layers amplify what is rounded."""

    def __init__(self, body: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        nn.init.constant_(body[-1].weight, 0.2)  # type: ignore[arg-type]  # of the last batch norm
        self.body, self.shortcut, self.relu = body, shortcut, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _conv(c: int, o: int, size: int, stride: int = 1, *, relu: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(c, o, size, stride, size // 2, bias=False), nn.BatchNorm2d(o)]
    return [*layers, nn.ReLU()] if relu else layers


def resnet(depth: int, classes: int = 1000) -> nn.Module:
    """Builds ResNet-18 or ResNet-50 (He et al. 2015, arXiv:1512.03385, table 1); a bottleneck strides in its 3x3."""
    blocks, wide = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[depth]
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    c = 64
    for stage, count in enumerate(blocks):
        width, o = 64 << stage, (64 << stage) * wide
        for i in range(count):
            stride = 2 if stage and not i else 1
            if wide == 1:
                body = [*_conv(c, o, 3, stride), *_conv(o, o, 3, relu=False)]
            else:
                body = [*_conv(c, width, 1), *_conv(width, width, 3, stride), *_conv(width, o, 1, relu=False)]
            same = stride == 1 and c == o
            shortcut = nn.Identity() if same else nn.Sequential(*_conv(c, o, 1, stride, relu=False))
            layers.append(Residual(nn.Sequential(*body), shortcut))
            c = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


class Inverted(nn.Module):
    """Computes an inverted residual block: wide, depthwise, times the gate of a squeeze if there is one, narrow."""

    def __init__(
        self, c: int, wide: int, o: int, size: int, stride: int, squeezed: int, kinds: tuple[type[nn.Module], ...]
    ) -> None:
        super().__init__()
        act, gate = kinds
        layers = [nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), act()] if wide != c else []
        depthwise = nn.Conv2d(wide, wide, size, stride, size // 2, groups=wide, bias=False)
        self.body = nn.Sequential(*layers, depthwise, nn.BatchNorm2d(wide), act())
        narrow, widen = (nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)) if squeezed else (None, None)
        inner = act() if act is nn.SiLU else nn.ReLU()
        pool = nn.AdaptiveAvgPool2d(1)
        self.gate = None if narrow is None else nn.Sequential(pool, narrow, inner, widen, gate())  # type: ignore[arg-type]
        self.last = nn.Sequential(nn.Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o))
        self.adds = stride == 1 and c == o
        if self.adds:
            nn.init.constant_(self.last[1].weight, 0.2)  # type: ignore[arg-type]  # as in `Residual`

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = self.last(y if self.gate is None else y * self.gate(y))
        return x + y if self.adds else y


def mobilenetv3() -> nn.Module:
    """Builds MobileNetV3-Small (Howard et al. 2019, arXiv:1905.02244, table 2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
    c = 16
    for size, wide, o, squeezed, act, stride in (
        (3, 16, 16, 8, nn.ReLU, 2), (3, 72, 24, 0, nn.ReLU, 2), (3, 88, 24, 0, nn.ReLU, 1),
        (5, 96, 40, 24, nn.Hardswish, 2), (5, 240, 40, 64, nn.Hardswish, 1), (5, 240, 40, 64, nn.Hardswish, 1),
        (5, 120, 48, 32, nn.Hardswish, 1), (5, 144, 48, 40, nn.Hardswish, 1), (5, 288, 96, 72, nn.Hardswish, 2),
        (5, 576, 96, 144, nn.Hardswish, 1), (5, 576, 96, 144, nn.Hardswish, 1),
    ):  # fmt: skip
        layers.append(Inverted(c, wide, o, size, stride, squeezed, (act, nn.Hardsigmoid)))
        c = o
    layers += [nn.Conv2d(c, 576, 1, bias=False), nn.BatchNorm2d(576), nn.Hardswish(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, 1000))


def efficientnet() -> nn.Module:
    """Builds EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
    c = 32
    for expand, size, o, count, first in (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    ):  # fmt: skip
        for i in range(count):
            stride = first if i == 0 else 1
            layers.append(Inverted(c, expand * c, o, size, stride, c // 4, (nn.SiLU, nn.Sigmoid)))
            c = o
    layers += [nn.Conv2d(c, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, 1000))


class LlamaBlock(nn.Module):
    """Computes a decoder layer with grouped-query attention, without rotary embedding: `[B, T, hidden]` to the same."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self._split(self.q(h), self.heads), *(self._split(p(h), self.kv_heads) for p in (self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@dataclass(frozen=True)
class Network:
    """Describes how to build a network, the size of one input, and the batch of training and throughput."""

    build: Callable[[bool], nn.Module]
    size: Callable[[bool], tuple[int, ...]]
    batch: int
    images: bool = True

    def inputs(self, batch: int, quick: bool, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(batch, *self.size(quick), generator=generator, device=device)


def _pixels(quick: bool) -> tuple[int, ...]:
    return (3, 64, 64) if quick else (3, 224, 224)


NETWORKS: dict[str, Network] = {
    "resnet18": Network(lambda quick: resnet(18), _pixels, 64),
    "resnet50": Network(lambda quick: resnet(50), _pixels, 64),
    "mobilenetv2": Network(
        lambda quick: build("mobilenetv2", in_channels=3, num_classes=1000, image_size=_pixels(quick)[1]), _pixels, 64
    ),
    "mobilenetv3": Network(lambda quick: mobilenetv3(), _pixels, 64),
    "efficientnet": Network(lambda quick: efficientnet(), _pixels, 64),
    # that of `golden-stick demo`, on Fashion-MNIST
    "resnet20": Network(
        lambda quick: build("resnet20", in_channels=1, num_classes=10, image_size=28), lambda quick: (1, 28, 28), 64
    ),
    # of an 8B Llama; quick: of SmolLM2-135M
    "llama-block": Network(
        lambda quick: LlamaBlock(576, 9, 3, 1536) if quick else LlamaBlock(4096, 32, 8, 14336),
        lambda quick: (64, 576) if quick else (512, 4096),
        8,
        images=False,
    ),
}
