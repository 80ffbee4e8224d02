"""Measures the ceilings that results are compared with, on this device in this run: a copy, and matrix products."""

from __future__ import annotations

import torch

from bench.timing import time_calls

SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # read; as much again is written


def copy_bandwidth(device: str, seconds: float = 1.0) -> float:
    """Measures bytes read plus bytes written per second by `torch.Tensor.copy_`, beyond any cache, in GB/s."""
    nbytes = COPY_BYTES[torch.device(device).type]
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    timing = time_calls([lambda: target.copy_(source)], device, seconds)
    return 2 * nbytes / timing.ms_p20 / 1e6


def product_peaks(device: str, seconds: float = 1.0) -> dict[str, float]:
    """TFLOP/s (TOP/s) of torch's own products of large square matrices in bf16 and int8, as fast as they come."""
    n = SIDES[torch.device(device).type]
    floats = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    codes = torch.randint(-8, 8, (n, n), dtype=torch.int8, device=device)
    calls = {"bfloat16": lambda: floats @ floats, "int8": lambda: torch._int_mm(codes, codes.t())}
    return {name: 2 * n**3 / time_calls([call], device, seconds).ms_p20 / 1e9 for name, call in calls.items()}


def copies_beyond_cache(nbytes: int, device: str) -> int:
    """Returns how many copies of a call's inputs and outputs it takes so that none is in the cache at its turn."""
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, 1 + 2 * cache // max(nbytes, 1)))
