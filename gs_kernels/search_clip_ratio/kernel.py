"""Searches clip ratios on a GPU: a program holds whole rows and tries all ratios on them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.observe.ref import symmetric_zero
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import inverse, nearest_level, qparams, reduce_range

ELEMENTS = 2048  # of a program with shorter rows: 16 a thread


@triton.jit
def _search_clip_ratio_kernel(
    ratio_ptr,
    x_ptr, ratios_ptr, importance_ptr,
    C, N, R,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offs_n = tl.arange(0, BLOCK_N)
    mask_c, mask_n = offs_c < C, offs_n < N
    mask = mask_c[:, None] & mask_n[None, :]
    offs = (offs_c * N)[:, None] + offs_n[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + offs, mask=mask, other=0.0)
    low, high = reduce_range(x, mask, 1)  # [BLOCK_C]

    best = tl.full((BLOCK_C,), float("inf"), tl.float32)
    found = tl.full((BLOCK_C,), 1.0, tl.float32)
    for step in range(R):
        ratio = tl.load(ratios_ptr + step)
        scale, zero = qparams(low * ratio, high * ratio, QMIN, QMAX, SYMMETRIC, ZERO)
        level = nearest_level(x, inverse(scale, zero)[:, None], zero[:, None], QMIN, QMAX)
        error = (level - zero[:, None]) * scale[:, None] - x
        error *= error
        if importance_ptr is not None:
            error *= importance
        error = tl.sum(tl.where(mask, error, 0.0), 1)
        better = error < best
        found, best = tl.where(better, ratio, found), tl.where(better, error, best)
    tl.store(ratio_ptr + offs_c, found, mask=mask_c)


def search_clip_ratio_triton(
    x: Tensor, ratios: Tensor, importance: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    channels, n = x.shape
    found = fresh(x.new_empty(channels, dtype=torch.float32))
    block_n = triton.next_power_of_2(n)
    block_c = power_of_two(channels, max(1, ELEMENTS // block_n))
    launch(
        _search_clip_ratio_kernel, (triton.cdiv(channels, block_c),),
        found, x, ratios, importance, channels, n, ratios.numel(),
        QMIN=int(qmin), QMAX=int(qmax), SYMMETRIC=symmetric, ZERO=symmetric_zero(qmin, qmax) if symmetric else 0.0,
        BLOCK_C=block_c, BLOCK_N=block_n, num_warps=min(16, max(4, block_c * block_n // 1024)),
    )
    return found
