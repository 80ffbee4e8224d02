"""Scores candidates on a GPU: the fake-quantized product of a tile is added up by column, and never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.score_candidates.tiles import choose_tile
from gs_kernels.triton_lib import inverse, nearest_level


@triton.jit
def _score_candidates_kernel(
    score_ptr,
    x_ptr, scale_ptr, zero_ptr, w_ptr, target_ptr, importance_ptr,
    M, N, K,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    candidate = pid // tiles
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    scale, zero = tl.load(scale_ptr + candidate), tl.load(zero_ptr + candidate)
    inv = inverse(scale, zero)

    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, M, BLOCK_M):
        offs_m = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask_m = offs_m < M
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            mask_k = offs_k < K
            mask = mask_m[:, None] & mask_k[None, :]
            x = tl.load(x_ptr + (offs_m * K)[:, None] + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            mask = mask_k[:, None] & mask_n[None, :]
            w = tl.load(w_ptr + (offs_n * K)[None, :] + offs_k[:, None], mask=mask, other=0.0)
            x = ((nearest_level(x, inv, zero, QMIN, QMAX) - zero) * scale).to(DTYPE)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        mask = mask_m[:, None] & mask_n[None, :]
        offs = (offs_m * N)[:, None] + offs_n[None, :]
        target = tl.load(target_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(mask, acc, 0.0) - target
        error *= tl.load(importance_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(error * error, 0)

    tl.store(score_ptr + candidate * N + offs_n, total, mask=mask_n)


def score_candidates_triton(
    x: Tensor, scale: Tensor, zero: Tensor, w: Tensor, target: Tensor, importance: Tensor, qmin: int, qmax: int,
) -> Tensor:
    (m, k), n, candidates = x.shape, w.shape[0], scale.shape[0]
    scores = fresh(x.new_empty(candidates, n, dtype=torch.float32))
    tile = choose_tile(x.dtype)
    launch(
        _score_candidates_kernel, (candidates * triton.cdiv(n, tile.block_n),),
        scores, x, scale, zero, w, target, importance, m, n, k,
        QMIN=int(qmin), QMAX=int(qmax),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return scores
