"""Requantizes in the shortest torch that says it: the oracle of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.fake_quant.ref import dequantize_ref, quantize_ref


def requantize_ref(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor | None = None,
    b_scale: Tensor | None = None,
    b_zero: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    qmin: int = -128,
    qmax: int = 127,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    y = dequantize_ref(a, a_scale, a_zero, dtype=dtype)
    if b is not None and b_scale is not None and b_zero is not None:
        y = y + dequantize_ref(b, b_scale, b_zero, dtype=dtype)
    y = ACTIVATIONS[activation].function(y)
    if out_scale is None or out_zero is None:
        return y
    return quantize_ref(y, out_scale, out_zero, qmin=qmin, qmax=qmax).to(torch.int8)
