"""Times a call: many samples, reported as minimum and percentiles, never as a mean."""

from __future__ import annotations

import ctypes
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gs_kernels.tuning.graph_timing import SAMPLES, Call, collect_samples, round_times

FEW_SAMPLES = 3  # of calls that take long
CPU_SAMPLE_S = 2e-4  # a sample repeats the call until the clock's own cost is lost in it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


@dataclass(frozen=True)
class Timing:
    """Holds milliseconds of one call. launch_us: CPU time to issue it, on a GPU. graph: replayed from a CUDA graph."""

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


def keep_freed_memory() -> bool:
    """Makes this process keep what tensors free, and says whether it can: glibc gives the largest blocks back at once.

    A call whose result is freed before the next call otherwise waits for new pages, or not, by what else lies in the
    heap: an op of 3 MB took 0.95 ms beside 0.52. Within a network other layers' memory is there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))


def keep_results(call: Call, count: int = 3) -> Call:
    """Returns `call` with its last `count` results kept alive, as those of a network's layers are.

    A result that is freed at once leaves its place to the next call, still in the cache, and whether it is that place
    or another depends on what else the call allocates: one of 13 MB took 3.4 ms beside 2.1.
    """
    results: deque[Any] = deque(maxlen=count)
    return lambda: results.append(call())


def time_cpu(call: Call, seconds: float) -> Timing:
    def repeat(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) / n

    repeat(1)
    once = repeat(1)
    # a call that takes longer than its share of the time is not repeated to learn how long it takes
    slow = SAMPLES[0] * once > seconds
    n = 1 if slow else max(1, round(CPU_SAMPLE_S / max(repeat(3), 1e-9)))
    return summarize(collect_samples(lambda: repeat(n) * 1e3, seconds, FEW_SAMPLES if slow else SAMPLES[0]))


def time_cuda(calls: Sequence[Call], seconds: float) -> Timing:
    """Times `calls`, one per copy of the inputs, in turn, as the tuner times tiles."""
    ms, graph = round_times(calls, seconds)
    return summarize(ms, launch_us=_launch_us(calls), graph=graph)


def _launch_us(calls: Sequence[Call]) -> float:
    samples = []
    for call in (list(calls) * 20)[:20]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(samples)[len(samples) // 2]


def time_calls(calls: Sequence[Call], device: str, seconds: float) -> Timing:
    """Times one call on either device. On a CPU there is one copy of the inputs, as in a training step."""
    return time_cuda(calls, seconds) if torch.device(device).type == "cuda" else time_cpu(calls[0], seconds)
