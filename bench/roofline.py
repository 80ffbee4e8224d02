"""Measures the ceilings that results are compared with, on this device in this run: a copy, and matrix products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.timing import time_calls
from gs_kernels.qmatmul.op_fp8 import SM as FP8_SM
from gs_kernels.runtime.device import capabilities

SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # read; as much again is written


def copy_bandwidth(device: str, seconds: float = 1.0) -> float:
    """Measures bytes read plus bytes written per second by `torch.Tensor.copy_`, beyond any cache, in GB/s.

    Of random bytes: a GPU moves zeros faster.
    """
    nbytes = COPY_BYTES[torch.device(device).type]
    generator = torch.Generator(device=device).manual_seed(0)
    words = torch.randint(-(1 << 62), 1 << 62, (2, nbytes // 8), device=device, generator=generator)
    timing = time_calls([partial(words[1].copy_, words[0]), partial(words[0].copy_, words[1])], device, seconds)
    return 2 * nbytes / timing.ms_p20 / 1e6


def product_peaks(device: str, seconds: float = 1.0) -> dict[str, float]:
    """TFLOP/s (TOP/s) of torch's own products of large square matrices in bf16, int8 and, if the GPU has it, fp8."""
    n = SIDES[torch.device(device).type]
    generator = torch.Generator(device=device).manual_seed(0)
    floats = torch.randn(n, n, device=device, generator=generator)
    codes = torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device, generator=generator)
    calls = {
        "bfloat16": partial(torch.matmul, *[floats.bfloat16()] * 2),
        "int8": partial(torch._int_mm, codes, codes.t()),
    }
    if torch.device(device).type == "cuda" and capabilities(torch.device(device).index or 0).sm >= FP8_SM:
        calls["fp8"] = partial(_fp8_product, floats.to(torch.float8_e4m3fn), torch.ones((), device=device))
    return {name: 2 * n**3 / time_calls([call], device, seconds).ms_p20 / 1e9 for name, call in calls.items()}


def _fp8_product(x: Tensor, one: Tensor) -> Tensor:
    return torch._scaled_mm(x, x.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def peak_of(op: str, peaks: dict[str, float]) -> float:
    """Returns the peak of the products that an op is made of: of int8 or fp8 for ops of those, else of bf16."""
    return peaks[next((kind for kind in ("int8", "fp8") if op.endswith(f"_{kind}") and kind in peaks), "bfloat16")]
