"""Requantizes on a GPU: one kernel reads the codes, adds, activates, rounds and writes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.strided_rows import same_layout
from gs_kernels.fake_quant.tiles import ELEMENTS, WARPS, power_of_two
from gs_kernels.requantize.cpu import is_dense
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import SCALE_MAX, activate, clamp, inverse, nearest_level

ROUNDED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit
def _rounded(v, ROUND: tl.constexpr):
    """Rounds v, fp32, to a number that fp16 (ROUND 1) or bf16 (2) holds; fp32 (0) stays."""
    if ROUND == 1:
        v = v.to(tl.float16).to(tl.float32)
    elif ROUND == 2:
        v = v.to(tl.bfloat16).to(tl.float32)
    return v


@triton.jit
def _values(codes_ptr, scale_ptr, zero_ptr, offs, mask, ROUND: tl.constexpr):
    codes = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    v = (codes - tl.load(zero_ptr)) * tl.load(scale_ptr)
    # the clamp, which changes no finite value, keeps compilers from contracting this product and the sum behind it
    return _rounded(clamp(v, -SCALE_MAX, SCALE_MAX), ROUND)


@triton.jit
def _requantize_kernel(
    y_ptr,
    a_ptr, a_scale_ptr, a_zero_ptr, b_ptr, b_scale_ptr, b_zero_ptr, out_scale_ptr, out_zero_ptr,
    N,
    QMIN: tl.constexpr, QMAX: tl.constexpr, ACTIVATION: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    y = _values(a_ptr, a_scale_ptr, a_zero_ptr, offs, mask, ROUND)
    if b_ptr is not None:
        y = _rounded(y + _values(b_ptr, b_scale_ptr, b_zero_ptr, offs, mask, ROUND), ROUND)
    y = _rounded(activate(y, ACTIVATION), ROUND)
    if out_scale_ptr is not None:
        scale, zero = tl.load(out_scale_ptr), tl.load(out_zero_ptr)
        level = nearest_level(y, inverse(scale, zero), zero, QMIN, QMAX)
        y = tl.where(level == level, level, QMIN)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def requantize_triton(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor | None, b_scale: Tensor | None, b_zero: Tensor | None,
    activation: str, dtype: torch.dtype, out_scale: Tensor | None, out_zero: Tensor | None, qmin: int, qmax: int,
) -> Tensor:
    a = a if is_dense(a) else torch.empty_like(a).copy_(a)
    if b is not None and not same_layout(b, a):
        b = torch.empty_like(a).copy_(b)
    y = fresh(torch.empty_like(a, dtype=dtype if out_scale is None else torch.int8))
    n = a.numel()
    if n == 0:
        return y
    block = power_of_two(n, ELEMENTS)
    launch(
        _requantize_kernel, (-(-n // block),), y, a, a_scale, a_zero, b, b_scale, b_zero, out_scale, out_zero, n,
        QMIN=qmin, QMAX=qmax, ACTIVATION=activation, ROUND=ROUNDED[dtype],
        BLOCK=block, num_warps=WARPS,
    )
    return y
