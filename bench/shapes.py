"""Lists what the benchmarks time beside the shapes of the specs: the convolutions of known networks at 224 x 224.

Every distinct shape is there once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gs_kernels.qconv2d.spec import shape
from gs_kernels.runtime.opspec import OpSpec, Shape


@dataclass(frozen=True)
class Layer:
    """Describes a convolution: channels, input size, square kernel, stride, groups; padding keeps size / stride."""

    c: int
    o: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1


def _once(layers: list[Layer]) -> tuple[Layer, ...]:
    return tuple(dict.fromkeys(layers))


def _resnet18() -> list[Layer]:
    layers = [Layer(3, 64, 224, 7, 2), Layer(64, 64, 56, 3)]
    for c, size in ((64, 56), (128, 28), (256, 14)):
        layers += [Layer(c, 2 * c, size, 3, 2), Layer(c, 2 * c, size, 1, 2), Layer(2 * c, 2 * c, size // 2, 3)]
    return layers


def _resnet50() -> list[Layer]:
    layers, c, size = [Layer(3, 64, 224, 7, 2)], 64, 56
    for width in (64, 128, 256, 512):
        stride = 1 if width == 64 else 2
        out = size // stride
        layers += [Layer(c, width, size), Layer(width, width, size, 3, stride), Layer(width, 4 * width, out)]
        layers += [Layer(c, 4 * width, size, 1, stride), Layer(4 * width, width, out), Layer(width, width, out, 3)]
        c, size = 4 * width, out
    return layers


def _mobilenet_v2() -> list[Layer]:
    layers, c, size = [Layer(3, 32, 224, 3, 2)], 32, 112
    for expand, out, count, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(count):
            stride, wide = first if i == 0 else 1, expand * c
            layers += [Layer(c, wide, size)] if expand > 1 else []
            layers += [Layer(wide, wide, size, 3, stride, wide), Layer(wide, out, size // stride)]
            c, size = out, size // stride
    return [*layers, Layer(320, 1280, 7)]


NETWORKS = {"resnet18": _once(_resnet18()), "resnet50": _once(_resnet50()), "mobilenet_v2": _once(_mobilenet_v2())}
BATCHES = (1, 8, 32, 128)


def _convolutions(layers: tuple[Layer, ...], bits: int, **more: Any) -> tuple[Shape, ...]:
    return tuple(
        shape(
            (batch, layer.c, layer.size, layer.size),
            layer.o,
            layer.kernel,
            bits,
            stride=layer.stride,
            padding=layer.kernel // 2,
            groups=layer.groups,
            bias=False,
            **more,
        )
        for batch in BATCHES
        for layer in layers
    )


def bench_shapes(spec: OpSpec) -> Mapping[str, tuple[Shape, ...]]:
    """Returns the shapes to time an op at, by group: those of its spec, and for convolutions those of networks."""
    of_networks: dict[str, tuple[Shape, ...]] = {}
    for name, layers in NETWORKS.items():
        if spec.name == "qconv2d":
            of_networks |= {f"{name}_w{bits}": _convolutions(layers, bits) for bits in (4, 2, 1)}
        elif spec.name == "qconv2d_int8":
            of_networks |= {f"{name}_w{bits}a8": _convolutions(layers, bits, out=True, x_zero=True) for bits in (8, 4)}
    return {**spec.bench_shapes, **of_networks}
