"""Measures how much memory a network takes, and a call at its peak."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(device: str | torch.device, call: Callable[[], Any]) -> int:
    """Measures the most bytes of tensors that a call makes, beyond what was there, by torch's allocators."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
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


def nbytes_of(net: nn.Module) -> int:
    """Counts the bytes of parameters and buffers, each storage once."""
    storages = {t.untyped_storage()._cdata: t.nbytes for t in (*net.parameters(), *net.buffers())}
    return sum(storages.values())
