"""Scoring candidates: implementations, registration, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import check_grid, check_input
from gs_kernels.pack.checks import FLOATS, check_tensor
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.score_candidates.cpu import score_candidates_cpu
from gs_kernels.score_candidates.ref import score_candidates_ref

WHO = "score_candidates"


def _score_candidates_ref(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    return score_candidates_ref(x, scale, zero, w, target, importance, qmin=qmin, qmax=qmax)


def _score_candidates_fake(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    return x.new_empty(scale.shape[0], w.shape[0], dtype=torch.float32)


SCORE_CANDIDATES = implementations("score_candidates", _score_candidates_ref, score_candidates_cpu)
_run = register(
    "score_candidates(Tensor x, Tensor scale, Tensor zero, Tensor w, Tensor target, Tensor importance, int qmin,"
    " int qmax) -> Tensor",
    SCORE_CANDIDATES,
    _score_candidates_fake,
)


def score_candidates(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor,
    *,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Scores grids of x by the outputs that they give: `sum_m (importance * (fake_quant(x) @ w^T - target))^2`.

    No output is stored. fake_quant rounds to the dtype of x; products are exact and sums fp32, never TF32. No gradient.

    Args:
        x: `[M, K]`, fp32 / fp16 / bf16. Here and below, what is not contiguous is copied.
        scale: `[C]` fp32, > 0: of each candidate, one for all of x.
        zero: `[C]` fp32.
        w: `[N, K]`, dtype of x.
        target: `[M, N]`, fp32 / fp16 / bf16: the outputs of x as it is, without bias.
        importance: `[M, N]`, fp32 / fp16 / bf16: of each error, e.g. the gradient of a loss there.
        qmin: smallest integer level.
        qmax: largest integer level.

    Returns:
        `[C, N]` fp32.

    Raises:
        ValueError, TypeError: if a tensor is not as above, or qmin >= qmax.

    Source: Yuan et al. 2022, arXiv:2111.12293.
    """
    check_input(WHO, x)
    if x.dim() != 2:
        raise ValueError(f"{WHO}: x must be [M, K], got {list(x.shape)}")
    count = scale.numel() if isinstance(scale, Tensor) else 0
    n = len(w) if isinstance(w, Tensor) and w.dim() else 0
    check_tensor(WHO, "scale", scale, (torch.float32,), (count,))
    check_tensor(WHO, "zero", zero, (torch.float32,), (count,))
    check_tensor(WHO, "w", w, (x.dtype,), (n, x.shape[1]))
    check_tensor(WHO, "target", target, FLOATS, (x.shape[0], n))
    if not count or not n:
        raise ValueError(f"{WHO}: scale and w must hold at least one candidate and output, got {count} and {n}")
    check_tensor(WHO, "importance", importance, FLOATS, (x.shape[0], n))
    named = {"scale": scale, "zero": zero, "w": w, "target": target, "importance": importance}
    for name, t in named.items():
        if t.device != x.device:
            raise ValueError(f"{WHO}: {name} must be on the device of x, {x.device}, got {t.device}; move it")
    check_grid(WHO, qmin, qmax)
    tensors = (t.detach().contiguous() for t in (x, *named.values()))
    return _run(*tensors, qmin, qmax)  # type: ignore[no-any-return]
