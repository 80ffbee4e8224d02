"""Computes the divergence on a GPU: one pass over both rows of logits, and one more for the gradient.

Exponents are powers of 2, of `u = x * c` with c = log2(e) / T. A program reads a row, some logits at a time, and keeps
the largest so far of each row as a number, the sums under them as vectors that are added up at the end.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.kl_divergence.tiles import choose_tile
from gs_kernels.qmatmul.kernel import rows_of
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _kl_divergence_fwd_kernel(
    kl_ptr, student_sum_ptr, teacher_sum_ptr,
    student_ptr, teacher_ptr,
    V, c,
    stride_sm, stride_tm,
    BLOCK_V: tl.constexpr,
):
    """Writes the divergence of a row and log sum exp(x / T) of both."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    student_ptr += pid_m * stride_sm
    teacher_ptr += pid_m * stride_tm
    top_s = tl.full((), LOWEST, tl.float32)
    top_t = tl.full((), LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_V,), tl.float32)
    sum_t = tl.zeros((BLOCK_V,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, V, BLOCK_V):
        mask = offs_v < V - first
        s = tl.load(student_ptr + first + offs_v, mask=mask, other=float("-inf")).to(tl.float32) * c
        t = tl.load(teacher_ptr + first + offs_v, mask=mask, other=float("-inf")).to(tl.float32) * c
        new_s, new_t = tl.maximum(top_s, tl.max(s, 0)), tl.maximum(top_t, tl.max(t, 0))
        old_t = tl.exp2(top_t - new_t)
        e = tl.exp2(t - new_t)
        sum_s = sum_s * tl.exp2(top_s - new_s) + tl.exp2(s - new_s)
        sum_t = sum_t * old_t + e
        acc = acc * old_t + tl.where(e == 0.0, 0.0, e * (t - s))
        top_s, top_t = new_s, new_t
    total = tl.sum(sum_t, 0)
    log_s, log_t = top_s + tl.log2(tl.sum(sum_s, 0)), top_t + tl.log2(total)
    tl.store(kl_ptr + pid_m, (tl.sum(acc, 0) / total + (log_s - log_t)) * LN2)
    tl.store(student_sum_ptr + pid_m, log_s * LN2)
    tl.store(teacher_sum_ptr + pid_m, log_t * LN2)


@triton.jit
def _kl_divergence_bwd_kernel(
    ds_ptr,
    dy_ptr, student_ptr, teacher_ptr, student_sum_ptr, teacher_sum_ptr,
    V, c, inverse,
    stride_sm, stride_tm,
    BLOCK_V: tl.constexpr,
):
    """Writes `(q - p) * dy / T` of some logits of a row."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(V, BLOCK_V)
    pid_m = pid // tiles
    offs_v = pid % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    s = tl.load(student_ptr + pid_m * stride_sm + offs_v, mask=mask, other=0.0).to(tl.float32) * c
    t = tl.load(teacher_ptr + pid_m * stride_tm + offs_v, mask=mask, other=0.0).to(tl.float32) * c
    q = tl.exp2(s - tl.load(student_sum_ptr + pid_m) * LOG2E)
    p = tl.exp2(t - tl.load(teacher_sum_ptr + pid_m) * LOG2E)
    ds = (q - p) * (tl.load(dy_ptr + pid_m) * inverse)
    tl.store(ds_ptr + pid_m * V + offs_v, ds.to(ds_ptr.dtype.element_ty), mask=mask)


def kl_divergence_triton(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = rows_of(student), rows_of(teacher)
    m, v = s.shape
    kl, student_sum, teacher_sum = (fresh(s.new_empty(m, dtype=torch.float32)) for _ in range(3))
    tile = choose_tile(v)
    if m:
        launch(
            _kl_divergence_fwd_kernel, (m,),
            kl, student_sum, teacher_sum, s, t, v, math.log2(math.e) / temperature, s.stride(0), t.stride(0),
            BLOCK_V=tile.block_v, num_warps=tile.warps,
        )
    shape = student.shape[:-1]
    return kl.view(shape), student_sum.view(shape), teacher_sum.view(shape)


def kl_divergence_backward_triton(
    dy: Tensor, student: Tensor, teacher: Tensor, student_sum: Tensor, teacher_sum: Tensor, temperature: float
) -> Tensor:
    s, t = rows_of(student), rows_of(teacher)
    m, v = s.shape
    ds = fresh(s.new_empty(m, v))
    tile = choose_tile(v)
    if m:
        launch(
            _kl_divergence_bwd_kernel, (m * triton.cdiv(v, tile.block_v),),
            ds, dy.contiguous(), s, t, student_sum, teacher_sum, v, math.log2(math.e) / temperature, 1 / temperature,
            s.stride(0), t.stride(0), BLOCK_V=tile.block_v, num_warps=tile.warps,
        )
    return ds.view(student.shape)
