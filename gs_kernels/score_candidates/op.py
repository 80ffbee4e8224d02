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
    importance: Tensor | None,
    qmin: int,
    qmax: int,
    pearson: bool,
) -> Tensor:
    return score_candidates_ref(x, scale, zero, w, target, importance, qmin=qmin, qmax=qmax, pearson=pearson)


def _score_candidates_fake(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor | None,
    qmin: int,
    qmax: int,
    pearson: bool,
) -> Tensor:
    return x.new_empty(5 if pearson else 1, scale.shape[0], w.shape[0], dtype=torch.float32)


SCORE_CANDIDATES = implementations("score_candidates", _score_candidates_ref, score_candidates_cpu)
_run = register(
    "score_candidates(Tensor x, Tensor scale, Tensor zero, Tensor w, Tensor target, Tensor? importance, int qmin,"
    " int qmax, bool pearson) -> Tensor",
    SCORE_CANDIDATES,
    _score_candidates_fake,
)


def score_candidates(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    pearson: bool = False,
) -> Tensor:
    """Scores grids of x by the outputs that they give: `sum_m (importance * (fake_quant(x) @ w^T - target))^2`.

    With pearson, the sums over rows that the correlation of outputs o with targets t is made of: t, o, t^2, o^2 and to.
    No output is stored. fake_quant rounds to the dtype of x; products are exact and sums fp32, never TF32. No gradient.

    Args:
        x: `[M, K]`, fp32 / fp16 / bf16. Here and below, what is not contiguous is copied.
        scale: `[C]` fp32, > 0: of each candidate, one for all of x.
        zero: `[C]` fp32.
        w: `[N, K]`, dtype of x.
        target: `[M, N]`, fp32 / fp16 / bf16: the outputs of x as it is, without bias.
        importance: `[M, N]`, fp32 / fp16 / bf16: of each error, e.g. the gradient of a loss there; None for 1.
        qmin: smallest integer level.
        qmax: largest integer level.
        pearson: sums of the correlation and not of errors; without importance.

    Returns:
        `[1, C, N]` fp32; with pearson `[5, C, N]`.

    Raises:
        ValueError, TypeError: if a tensor is not as above, importance comes with pearson, or qmin >= qmax.

    Source: Yuan et al. 2022, arXiv:2111.12293 (the error weighted by the gradient); Liu et al. 2021, arXiv:2106.14156
    (the correlation).
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
    if importance is not None:
        check_tensor(WHO, "importance", importance, FLOATS, (x.shape[0], n))
        if pearson:
            raise ValueError(f"{WHO}: importance must be None with pearson, got a tensor; use pearson=False")
    named = {"scale": scale, "zero": zero, "w": w, "target": target, "importance": importance}
    for name, t in named.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{WHO}: {name} must be on the device of x, {x.device}, got {t.device}; move it")
    check_grid(WHO, qmin, qmax)
    tensors = (None if t is None else t.detach().contiguous() for t in (x, *named.values()))
    return _run(*tensors, qmin, qmax, pearson)  # type: ignore[no-any-return]
