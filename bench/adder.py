"""Times L1 products on a CPU beside convolutions of the same shapes: `python -m bench.adder`.

A row holds the milliseconds of one layer: the L1 product of floats and the gradient of its image, that of 8-bit codes,
codes in and out, and beside them `F.conv2d`, the gradient of its image, `qconv2d_int8` from codes to codes, and the
L1 distances of PyTorch, of the unfolded image. What is counted is the time that one thread computed, not that on the
clock, and providers take turns: so a busy machine is busy for all. `busy` is how many processes
wanted a core meanwhile.

With `--planes`, rows of codes of 2 and 3 bits: the L1 product of codes beside the same by products of planes, which are
bits: `|a - b| = a + b - 2 sum_t [a >= t] [b >= t]`, over thresholds t. Making planes, and the sums of a and of b, are
left out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from bench import record
from bench.peers.adder import cdist_conv2d
from gs_kernels import adder_conv2d, adder_int8, pack_weight
from gs_kernels.for_layers import prepared_adder_int8, prepared_qconv2d_int8

ROUNDS = 5
ONE = torch.ones(1)
GRID: dict[str, Any] = {"activation": "relu", "dtype": torch.float32, "out_scale": ONE, "out_zero": None}
NO_KERNELS = "bench.adder: needs the C++ kernels; run `python -m gs_kernels.cpu.build`"
Calls: TypeAlias = dict[str, Callable[[], Tensor]]


class Layer(NamedTuple):
    """Describes a layer: images, channels of x and y, size of x, of filters, and the stride."""

    batch: int
    c: int
    o: int
    size: int
    kernel: int
    stride: int = 1


LAYERS = (
    Layer(16, 16, 16, 32, 3),
    Layer(16, 32, 32, 16, 3),
    Layer(16, 64, 64, 8, 3),
    Layer(1, 64, 64, 56, 3),
    Layer(1, 64, 128, 56, 3, 2),
    Layer(1, 128, 128, 28, 3),
    Layer(1, 256, 256, 14, 3),
    Layer(1, 256, 64, 56, 1),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.adder", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for one number of one round")
    parser.add_argument("--planes", action="store_true", help="codes of few bits, as planes")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only so many")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    for layer in LAYERS[: chosen.layers]:
        ms = in_turns(planes_providers(layer) if chosen.planes else agreeing_providers(layer), chosen.seconds)
        row = {"layer": layer._asdict(), "ms": ms, "busy": round(os.getloadavg()[0], 1)}
        record.append(row, "adder planes" if chosen.planes else "adder", device="cpu", path=chosen.out)
        print(*layer, row["ms"], flush=True)
    return 0


def in_turns(calls: Calls, seconds: float) -> dict[str, float]:
    """Returns milliseconds by provider: the least of several rounds."""
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            ms[name].append(_computing_ms(call, seconds))
    return {name: round(min(times), 4) for name, times in ms.items()}


def _computing_ms(call: Callable[[], Tensor], seconds: float) -> float:
    """Returns the least time that a call computes, of those that begin within so many seconds."""
    end, least = time.perf_counter() + seconds, math.inf
    while True:
        start = time.thread_time()
        call()
        least = min(least, time.thread_time() - start)
        if time.perf_counter() > end:
            return 1e3 * least


def agreeing_providers(layer: Layer) -> Calls:
    """Returns `providers`, checked.

    Raises:
        RuntimeError: if the L1 product is not that of PyTorch's distances.
    """
    calls = providers(layer)
    error = float((calls["adder"]() - calls["cdist"]()).abs().max() / calls["cdist"]().abs().max())
    if not error <= 1e-5:
        raise RuntimeError(f"bench.adder: ours must give the distances of torch.cdist, got {error:.2g} for {layer}")
    return calls


def providers(layer: Layer) -> Calls:
    generator = torch.Generator().manual_seed(0)
    padding, sizes = layer.kernel // 2, sizes_of(layer)
    x, w = (torch.randn(size, generator=generator) for size in sizes)
    image, filters = (torch.randint(-128, 128, size, generator=generator, dtype=torch.int8) for size in sizes)
    image = image.contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    y = adder_conv2d(leaf, w, layer.stride, padding)
    dy = torch.randn(y.shape, generator=generator)
    compare, convolve = comparing(layer, image, filters), convolving(layer, image, filters)
    return {
        "adder": lambda: adder_conv2d(x, w, layer.stride, padding),
        "conv2d": lambda: F.conv2d(x, w, None, layer.stride, padding),
        "adder dx": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0],
        "conv2d dx": lambda: conv2d_input(x.shape, w, dy, layer.stride, padding),
        "adder int8": compare,
        "conv2d int8": convolve,
        "cdist": lambda: cdist_conv2d(x, w, layer.stride, padding, 1),
    }


def planes_providers(layer: Layer) -> Calls:
    """Returns the L1 product of codes, and products of the planes of codes of 2 and 3 bits.

    Raises:
        RuntimeError: if the products are not the differences.
    """
    generator = torch.Generator().manual_seed(0)
    calls: Calls = {}
    for bits in (2, 3):
        levels = 2**bits
        image, filters = (
            torch.randint(0, levels, size, generator=generator, dtype=torch.int8) for size in sizes_of(layer)
        )
        image = image.contiguous(memory_format=torch.channels_last)
        if l1_by_planes(layer, image, filters, levels).ne(_sums(layer, image, filters)).any():
            raise RuntimeError(f"bench.adder: products of planes must be the differences, got others for {layer}")
        of_bits = planes_of(image, levels).contiguous(memory_format=torch.channels_last)
        calls.setdefault("adder int8", comparing(layer, image, filters))  # takes as long, whatever the codes
        calls[f"planes {bits} bit"] = convolving(layer, of_bits, planes_of(filters, levels))
    return calls


def planes_of(codes: Tensor, levels: int) -> Tensor:
    """Returns `[..., (levels - 1) * C, ...]`: for each threshold t the bits `codes >= t`."""
    return torch.cat([(codes >= t).to(torch.int8) for t in range(1, levels)], 1)


def l1_by_planes(layer: Layer, image: Tensor, filters: Tensor, levels: int) -> Tensor:
    """Computes `-sum |a - b|` of codes from 0 on, padded by 0, as `2 sum_t [a >= t] [b >= t] - a - b`, in fp32."""
    options = {"stride": layer.stride, "padding": layer.kernel // 2}
    a, b = image.float(), filters.float()
    common = F.conv2d(planes_of(image, levels).float(), planes_of(filters, levels).float(), None, **options)
    return 2 * common - F.conv2d(a, torch.ones_like(b[:1]), None, **options) - b.sum((1, 2, 3))[:, None, None]


def _sums(layer: Layer, image: Tensor, filters: Tensor) -> Tensor:
    return adder_int8(image, filters, stride=layer.stride, padding=layer.kernel // 2).float()


def sizes_of(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (layer.batch, layer.c, layer.size, layer.size), (layer.o, layer.c, layer.kernel, layer.kernel)


def comparing(layer: Layer, image: Tensor, filters: Tensor) -> Callable[[], Tensor]:
    """Returns what computes the L1 product from codes to codes, with ReLU."""
    run = prepared_adder_int8(image, filters, ONE, None, **_where(layer), zero=None, **GRID)
    if run is None:
        raise RuntimeError(NO_KERNELS)
    return lambda: run(image)


def convolving(layer: Layer, image: Tensor, filters: Tensor) -> Callable[[], Tensor]:
    """Returns what computes the convolution from codes to codes, with ReLU."""
    k = filters[0].numel()
    codes = (filters.permute(0, 2, 3, 1).flatten(1).int() + 128).to(torch.uint8)
    packed = pack_weight(codes, torch.ones(layer.o, 1), torch.full((layer.o, 1), 128.0), bits=8, group_size=k)
    whole: dict[str, Any] = {"kernel_size": layer.kernel, **_where(layer), "groups": 1}
    run = prepared_qconv2d_int8(image, ONE, packed, None, **whole, x_zero=None, **GRID)
    if run is None:
        raise RuntimeError(NO_KERNELS)
    at = run.at(image.shape)
    return lambda: at(image)


def _where(layer: Layer) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": layer.kernel // 2, "dilation": 1}


if __name__ == "__main__":
    sys.exit(main())
