"""Measures how much memory a network takes, and a call at its peak."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

LOG_LEVEL = "KINETO_LOG_LEVEL"  # of the profiler's native half; 6 is above all that it logs


def peak_bytes(device: str | torch.device, call: Callable[[], Any]) -> int:
    """Measures the most bytes of tensors that a call makes, beyond what was there, by torch's allocators."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    peak = held = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the profiler from logging each start and stop to stderr; it reads the variable when it starts first."""
    given = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = given or "6"
    try:
        yield
    finally:
        if given is None:
            del os.environ[LOG_LEVEL]


def nbytes_of(net: nn.Module) -> int:
    """Counts the bytes of parameters and buffers, each storage once."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in (*net.parameters(), *net.buffers()))}
    return sum(storages.values())
