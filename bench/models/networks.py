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
