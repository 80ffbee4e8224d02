"""Times a call: many samples, reported as minimum and percentiles, never as a mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

MIN_SAMPLES = 5
FEW_SAMPLES = 3  # of calls that take long
MAX_SAMPLES = 500
CPU_SAMPLE_S = 2e-4  # a sample repeats the call until the clock's own cost is lost in it


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call. launch_us: CPU time to issue it, on a GPU. graph: replayed from a CUDA graph."""

    ms_min: float
    ms_p20: float
    ms_p50: float
    ms_p80: float
    samples: int
    launch_us: float | None = None
    graph: bool = False


def summarize(ms: Sequence[float], *, launch_us: float | None = None, graph: bool = False) -> Timing:
    ordered = sorted(ms)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(ordered[0], p20, p50, p80, len(ordered), launch_us, graph)


def _sample(measure: Callable[[], float], seconds: float, least: int = MIN_SAMPLES) -> list[float]:
    """Milliseconds of `measure()`, again and again for `seconds`."""
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < stop and len(samples) < MAX_SAMPLES):
        samples.append(measure())
    return samples


def time_cpu(call: Call, seconds: float) -> Timing:
    def repeat(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) / n

    repeat(1)
    once = repeat(1)
    # a call that takes longer than its share of the time is not repeated to learn how long it takes
    slow = MIN_SAMPLES * once > seconds
    n = 1 if slow else max(1, round(CPU_SAMPLE_S / max(repeat(3), 1e-9)))
    return summarize(_sample(lambda: repeat(n) * 1e3, seconds, FEW_SAMPLES if slow else MIN_SAMPLES))


def time_cuda(calls: Sequence[Call], seconds: float) -> Timing:
    """Times `calls`, one per copy of the inputs, in turn; a sample is the whole round divided by their number.

    The round is one CUDA graph, so that short kernels are not timed by the CPU that launches them. Every output of the
    round stays alive, so that none is written to memory that is still in the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:1]):
            call()
    torch.cuda.synchronize()
    launch_us = _launch_us(calls)
    graph = _capture(calls)

    def run_round() -> None:
        if graph is None:
            _ = [call() for call in calls]
        else:
            graph.replay()

    def measure() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run_round()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls)

    run_round()
    torch.cuda.synchronize()
    return summarize(_sample(measure, seconds), launch_us=launch_us, graph=graph is not None)


def _launch_us(calls: Sequence[Call]) -> float:
    samples = []
    for call in (list(calls) * 20)[:20]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(samples)[len(samples) // 2]


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
    except RuntimeError:
        # a call that synchronises cannot be captured: it is timed as it is launched, and the row says graph=false
        torch.cuda.synchronize()
        return None
    del outputs
    return graph


def time_calls(calls: Sequence[Call], device: str, seconds: float) -> Timing:
    """Times one call on either device. On a CPU there is one copy of the inputs, as in a training step."""
    return time_cuda(calls, seconds) if torch.device(device).type == "cuda" else time_cpu(calls[0], seconds)
