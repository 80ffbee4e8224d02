"""Times calls on a GPU: replays of a CUDA graph that lasts so long that its start is lost in it.

    operands = [make() for _ in range(copies_beyond_cache(nbytes, "cuda"))]
    ms, graph = round_times([partial(run, x) for x in operands], seconds=0.05)

The tuner and the benchmarks time alike, so that a tile that is faster here is faster there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

ROUND_MS = 1.0  # a graph starts in 4 to 8 us: less than a percent of this
CALLS_MAX = 4000  # in one graph: each is a node, or more, to be kept and launched
COPIES_MAX = 256
SAMPLES = (5, 500)  # at least, and at most


def copies_beyond_cache(nbytes: int, device: str) -> int:
    """Returns how many copies of a call's inputs and outputs it takes so that none is in the cache at its turn.

    At least two on a GPU, also of what is larger than its cache: the end of one call is no start of the next.
    """
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(COPIES_MAX, 1 + 2 * cache // max(nbytes, 1)))


def repeats_of(round_ms: float, calls: int) -> int:
    """Returns how often a round of so many calls must be in a graph that lasts `ROUND_MS` or longer."""
    return max(1, min(math.ceil(ROUND_MS / max(round_ms, 1e-6)), CALLS_MAX // calls))


def collect_samples(measure: Callable[[], float], seconds: float, least: int = SAMPLES[0]) -> list[float]:
    """Lists what `measure()` returned, again and again for `seconds`, at least `least` times."""
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < stop and len(samples) < SAMPLES[1]):
        samples.append(measure())
    return samples


def round_times(calls: Sequence[Call], seconds: float) -> tuple[list[float], bool]:
    """Measures the milliseconds of one of `calls`, which are one per copy of the operands and made in turn.

    The round is in a CUDA graph, as often as it takes to last `ROUND_MS`, so that short kernels are timed neither by
    the CPU that launches them nor by the start of the graph. Every output of a round stays alive to its end, so that
    none is written to memory that is still in the cache.

    Returns:
        samples, each a replay divided by its calls, and whether a graph was replayed: a call that synchronizes cannot
        be captured, and is timed as it is launched.
    """
    _warm_up(calls)
    graph, repeats = _capture(calls, 1), 1
    if graph is not None:
        repeats = repeats_of(min(_elapsed(graph.replay) for _ in range(3)), len(calls))
        longer = _capture(calls, repeats) if repeats > 1 else None
        graph, repeats = (graph, 1) if longer is None else (longer, repeats)

    def run() -> None:
        if graph is None:
            _ = [call() for call in calls]
        else:
            graph.replay()

    _elapsed(run)
    return collect_samples(lambda: _elapsed(run) / (len(calls) * repeats), seconds), graph is not None


def _warm_up(calls: Sequence[Call]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:1]):
            call()
    torch.cuda.synchronize()


def _elapsed(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _capture(calls: Sequence[Call], repeats: int) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                outputs = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    del outputs
    return graph
