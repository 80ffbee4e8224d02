"""Times every convolution of a network on a CPU, ours and PyTorch's: `python -m bench.convolutions --batch 1 8`.

A row holds the milliseconds of one shape with bias and ReLU, as they follow each other in a network: `F.conv2d` of
float32 and of bfloat16, channels-last, and `torch.compile` of the former if asked for; a packed 4-bit weight whose
floats are kept, as a converted layer calls it (w4), and by `qconv2d` (w4 qconv2d), which looks at its arguments in each
call; and 8-bit codes in and out, as consecutive converted layers hand them on. Nothing is timed before it agrees with
the float32 one, and neither the memory of results nor the last results are given back, as in a network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record
from bench.shapes import NETWORKS, Layer
from bench.timing import keep_freed_memory, keep_results, time_cpu
from gs_kernels import dequantize_packed, pack_weight, qconv2d, quantize
from gs_kernels.qconv2d.op import prepared_qconv2d
from gs_kernels.qconv2d.op_int8 import prepared_qconv2d_int8, qconv2d_int8

ROUNDS = 5  # the calls are timed in turn, so that a slow moment of the machine is not one call's alone
Calls = dict[str, Callable[[], Tensor]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.convolutions", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compile", action="store_true", help="time torch.compile too: takes seconds a shape")
    parser.add_argument("--seconds", type=float, default=0.2, help="for one number")
    parser.add_argument("--limit", type=float, metavar="S", help="start nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    chosen = parser.parse_args(argv)
    if min(chosen.batch) < 1:
        parser.error(f"--batch must be >= 1, got {min(chosen.batch)}")
    start = time.monotonic()
    for name in chosen.network:
        for batch in chosen.batch:
            for layer in NETWORKS[name]:
                if chosen.limit is not None and time.monotonic() - start > chosen.limit:
                    print(f"--limit {chosen.limit:g} s reached before {name} batch {batch} {layer}; not timed")
                    return 1
                ms = measure(layer, batch, chosen.seconds, chosen.compile)
                row = {"network": name, "batch": batch, "layer": layer.__dict__, "ms": ms}
                record.append(row, "convolution", device="cpu", path=chosen.out)
                print(name, batch, *layer.__dict__.values(), ms, flush=True)
    return 0


def measure(layer: Layer, batch: int, seconds: float, compiled: bool = False) -> dict[str, float]:
    """Returns each provider's milliseconds, the median of rounds' medians.

    Raises:
        RuntimeError: if one does not give what the float convolution gives.
    """
    calls, tolerance = providers(layer, batch)
    if compiled:
        torch.compiler.reset()
        calls["compile"] = torch.compile(calls["float32"], dynamic=False)
    with torch.inference_mode():
        want = calls["float32"]()
        for name, call in calls.items():
            error = float((call().float() - want).abs().max() / want.abs().max())
            if not error <= tolerance.get(name, 1e-4):
                raise RuntimeError(
                    f"bench.convolutions: {name} must give the float result, got {error:.2g} for {layer}"
                )
        kept = {name: keep_results(call) for name, call in calls.items()}
        rounds = [{name: time_cpu(call, seconds / ROUNDS).ms_p50 for name, call in kept.items()} for _ in range(ROUNDS)]
    return {name: round(statistics.median(times[name] for times in rounds), 4) for name in calls}


def providers(layer: Layer, batch: int) -> tuple[Calls, dict[str, float]]:
    """Returns the calls, and how far each may be from float32, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    c = layer.c // layer.groups
    k = layer.kernel**2 * c
    window: dict[str, Any] = {"stride": layer.stride, "padding": layer.kernel // 2, "groups": layer.groups}
    packed_window = {"kernel_size": layer.kernel, **window}
    codes = torch.randint(1, 16, (layer.o, k), generator=generator, dtype=torch.uint8)
    scale = torch.full((layer.o, 1), 0.1 / k**0.5)
    four = pack_weight(codes, scale, torch.full_like(scale, 8.0), bits=4, group_size=k)
    eight = pack_weight(codes + 120, scale, torch.full_like(scale, 128.0), bits=8, group_size=k)
    w = dequantize_packed(four).view(layer.o, layer.kernel, layer.kernel, c).permute(0, 3, 1, 2)
    bias = torch.randn(layer.o, generator=generator) * 0.1
    size = (batch, layer.c, layer.size, layer.size)
    image = torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
    image = image.contiguous(memory_format=torch.channels_last)
    x_scale, x_zero = torch.full((1,), 1 / 64), torch.full((1,), -128.0)
    x = (image.float() + 128) / 64
    halves = x.bfloat16(), w.bfloat16(), bias.bfloat16()

    def whole() -> Tensor:
        return F.conv2d(x, w, bias, **window).relu_()

    out = whole().amax().view(1) / 255
    grid: dict[str, Any] = {"x_zero": x_zero, "out_scale": out, "out_zero": torch.full((1,), -128.0)}
    grid |= {"activation": "relu", "dtype": torch.float32}
    prepared = prepared_qconv2d_int8(image, x_scale, eight, bias, **packed_window, dilation=1, **grid)
    ready = None if prepared is None else prepared.at(image.shape)
    kept = prepared_qconv2d(x, four, bias, **packed_window, dilation=1, activation="relu")
    assert kept is not None  # a CPU keeps what a weight outside inference mode gives
    convolve = kept.at(x.shape)

    def integers() -> Tensor:
        if ready is None:
            return qconv2d_int8(image, x_scale, eight, bias, **packed_window, **grid, keep_dense=True)
        return ready(image)

    calls: Calls = {
        "float32": whole,
        "bfloat16": lambda: F.conv2d(halves[0], halves[1], halves[2], **window).relu_(),
        "w4": lambda: convolve(x),
        "w4 qconv2d": lambda: qconv2d(x, four, bias, **packed_window, activation="relu", keep_dense=True),
        "w8a8": integers,
    }
    wanted = quantize(whole(), out, grid["out_zero"], qmin=-128, qmax=127).int()
    off = int((integers().int() - wanted).abs().max())
    if off > 1:
        raise RuntimeError(
            f"bench.convolutions: w8a8 must give the codes of the float result, got {off} off in {layer}"
        )
    return calls, {"bfloat16": 3e-2, "w8a8": float("inf")}  # codes were compared with codes


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
