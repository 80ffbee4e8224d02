"""Measures time and memory of one network under one algorithm: a training step, then the converted network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.networks import Network
from bench.models.onnx_runtime import onnx_runtime_rows
from bench.steps import kept_for_backward
from bench.timing import Timing, summarize, time_calls
from gs_algos import SLB, SimQAT
from gs_algos.core.memory import nbytes_of, peak_bytes

Make = Callable[[bool], Any]
ALGORITHMS: dict[str, Make] = {
    "float": lambda images: None,
    "bfloat16": lambda images: None,  # the float network cast, as it predicts; not trained
    "simqat-w8a8": lambda images: SimQAT(weight="int8@channel", act="int8@tensor:ema"),
    "simqat-w4a8": lambda images: SimQAT(weight="int4@channel:lsq", act="int8@tensor:lsq"),
    # without a batch norm behind a layer its weights need a scale
    "slb-w2": lambda images: SLB(weight="2bit@channel", total_steps=1000),
    "slb-w1": lambda images: SLB(weight="1bit@channel", total_steps=1000),
}


def _times(timing: Timing) -> dict[str, float]:
    return {name: round(getattr(timing, name), 3) for name in ("ms_min", "ms_p20", "ms_p50", "ms_p80")}


def _time(call: Callable[[], Any], device: str, seconds: float) -> Timing:
    """Times a call of a whole network: on a GPU without a CUDA graph, as a training loop runs them."""
    if torch.device(device).type != "cuda":
        return time_calls([call], device, seconds)
    samples = []
    for _ in range(max(5, round(10 * seconds))):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return summarize(samples[2:])


def measure(
    network: Network,
    algorithm: str,
    *,
    device: str,
    batch: int,
    quick: bool,
    seconds: float,
    onnx_runtime: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields three rows: "train" (a step with SGD), "latency" (one input), "throughput" (a batch) of what is converted.

    onnx_runtime: two more of a network of 8-bit activations, of what ONNX Runtime makes of our export.

    Images and the weights of convolutions are channels-last, which is what float networks are fastest with.
    """
    torch.manual_seed(0)
    net = network.build(quick).to(device)
    x = network.inputs(batch, quick, device)
    if network.images:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    if algorithm == "bfloat16":
        yield from _predicting(net.eval().bfloat16(), x.bfloat16(), device, seconds)
        return
    _settle(net, x)
    algo = ALGORITHMS[algorithm](network.images)
    if algo is not None:
        net = algo.apply(net, x[:2])
    step = _step(net.train(), algo, x)
    step()
    kept = _kept(net, x)
    memory = {"peak_bytes": peak_bytes(device, step)}
    yield {"phase": "train", "batch": batch, "saved_bytes": kept, **memory, **_times(_time(step, device, seconds))}
    net = net.eval() if algo is None else algo.convert(net.eval())
    yield from _predicting(net, x, device, seconds)
    if onnx_runtime and algorithm.endswith("a8"):
        for row in onnx_runtime_rows(net, x, seconds):
            yield {**row, "algorithm": f"{algorithm} in ONNX Runtime"}


def _predicting(net: nn.Module, x: Tensor, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    size = {"nbytes": nbytes_of(net)}
    for phase, inputs in (("latency", x[:1]), ("throughput", x)):
        with torch.inference_mode():
            memory = {"peak_bytes": peak_bytes(device, partial(net, inputs))}
            timing = _time(partial(net, inputs), device, seconds)
        rate = {"per_s": round(1e3 * inputs.shape[0] / timing.ms_p50, 2)}
        yield {"phase": phase, "batch": inputs.shape[0], **size, **memory, **_times(timing), **rate}


@torch.no_grad()
def _settle(net: nn.Module, x: Tensor) -> None:
    """Tells batch norms what they will see, as training has: else values shrink or grow from layer to layer.

    Quantized training then begins with useless ranges, and functions such as exp take several times as long.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        net.train()(x)
    for norm in norms:
        norm.momentum = 0.1


def _step(net: nn.Module, algo: Any, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)  # few steps from random weights must not diverge

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if algo is not None:
            algo.step()

    return step


def _kept(net: nn.Module, x: Tensor) -> int:
    ours = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    with kept_for_backward(ours) as kept:
        net(x)
    return sum(kept.values())
