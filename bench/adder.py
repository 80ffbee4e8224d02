"""Times L1 products on a CPU beside convolutions of the same shapes: `python -m bench.adder`.

A row holds the milliseconds of one layer: the L1 product of floats and the gradient of its image, that of 8-bit codes,
codes in and out, and beside them `F.conv2d`, the gradient of its image, `qconv2d_int8` from codes to codes, and the
L1 distances of PyTorch, of the unfolded image. What is counted is the time that one thread computed, not that on the
clock, and providers take turns: so a busy machine is busy for all. `busy` is how many processes
wanted a core meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from bench import record
from bench.peers.adder import cdist_conv2d
from gs_kernels import adder_conv2d, pack_weight
from gs_kernels.for_layers import prepared_adder_int8, prepared_qconv2d_int8

ROUNDS = 5


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
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only so many")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    for layer in LAYERS[: chosen.layers]:
        row = {"layer": layer._asdict(), "ms": measure(layer, chosen.seconds), "busy": round(os.getloadavg()[0], 1)}
        record.append(row, "adder", device="cpu", path=chosen.out)
        print(*layer, row["ms"], flush=True)
    return 0


def measure(layer: Layer, seconds: float) -> dict[str, float]:
    """Returns milliseconds by provider: the least of several rounds.

    Raises:
        RuntimeError: if the L1 product is not that of PyTorch's distances.
    """
    calls = providers(layer)
    error = float((calls["adder"]() - calls["cdist"]()).abs().max() / calls["cdist"]().abs().max())
    if not error <= 1e-5:
        raise RuntimeError(f"bench.adder: ours must give the distances of torch.cdist, got {error:.2g} for {layer}")
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


def providers(layer: Layer) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    padding, k = layer.kernel // 2, layer.c * layer.kernel**2
    sizes = (layer.batch, layer.c, layer.size, layer.size), (layer.o, layer.c, layer.kernel, layer.kernel)
    x, w = (torch.randn(size, generator=generator) for size in sizes)
    image, filters = (torch.randint(-128, 128, size, generator=generator, dtype=torch.int8) for size in sizes)
    image = image.contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    y = adder_conv2d(leaf, w, layer.stride, padding)
    dy = torch.randn(y.shape, generator=generator)
    one = torch.ones(1)
    where: dict[str, Any] = {"stride": layer.stride, "padding": padding, "dilation": 1}
    grid: dict[str, Any] = {"activation": "relu", "dtype": torch.float32, "out_scale": one, "out_zero": None}
    ours = prepared_adder_int8(image, filters, one, None, **where, zero=None, **grid)
    codes = (filters.permute(0, 2, 3, 1).flatten(1).int() + 128).to(torch.uint8)
    packed = pack_weight(codes, torch.ones(layer.o, 1), torch.full((layer.o, 1), 128.0), bits=8, group_size=k)
    whole: dict[str, Any] = {"kernel_size": layer.kernel, **where, "groups": 1}
    theirs = prepared_qconv2d_int8(image, one, packed, None, **whole, x_zero=None, **grid)
    if ours is None or theirs is None:
        raise RuntimeError("bench.adder: needs the C++ kernels; run `python -m gs_kernels.cpu.build`")
    convolve = theirs.at(image.shape)
    return {
        "adder": lambda: adder_conv2d(x, w, layer.stride, padding),
        "conv2d": lambda: F.conv2d(x, w, None, layer.stride, padding),
        "adder dx": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0],
        "conv2d dx": lambda: conv2d_input(x.shape, w, dy, layer.stride, padding),
        "adder int8": lambda: ours(image),
        "conv2d int8": lambda: convolve(image),
        "cdist": lambda: cdist_conv2d(x, w, layer.stride, padding, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
