"""Searching clip ratios: implementations, registration, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import check_grid, check_input
from gs_kernels.pack.checks import check_tensor
from gs_kernels.runtime.dispatch import implementations, triton_refuses
from gs_kernels.runtime.torch_op import register
from gs_kernels.search_clip_ratio.cpu import search_clip_ratio_cpu
from gs_kernels.search_clip_ratio.ref import search_clip_ratio_ref

WHO = "search_clip_ratio"
ROW_MAX = 16384  # elements of a row, that one program holds


def _triton_refuses(x: Tensor, *_: object) -> list[str]:
    reasons = triton_refuses(x)
    if x.shape[1] > ROW_MAX:
        reasons.append(f"needs rows of at most {ROW_MAX} elements, got {x.shape[1]}")
    return reasons


def _ref(x: Tensor, ratios: Tensor, importance: Tensor | None, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    return search_clip_ratio_ref(x, ratios, importance, qmin=qmin, qmax=qmax, symmetric=symmetric)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


SEARCH_CLIP_RATIO = implementations("search_clip_ratio", _ref, search_clip_ratio_cpu, _triton_refuses)
_run = register(
    "search_clip_ratio(Tensor x, Tensor ratios, Tensor? importance, int qmin, int qmax, bool symmetric) -> Tensor",
    SEARCH_CLIP_RATIO,
    _fake,
)


def search_clip_ratio(
    x: Tensor, ratios: Tensor, importance: Tensor | None = None, *, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    """Finds for each row the ratio r with the least `sum(importance * (fake_quant(x) - x)^2)`, on a grid for r * range.

    The grid of a ratio is `choose_qparams(r * min(x), r * max(x))`. All ratios are tried in one read of x. Of equal
    errors the first wins; sums are fp32 or better, so of errors that agree in six digits either may. No gradient.

    Args:
        x: `[C, n]`, fp32 / fp16 / bf16: a row is what shares a scale. What is not contiguous is copied.
        ratios: `[R]` fp32, in (0, 1].
        importance: `[C, n]` fp32, >= 0: how many times each squared error counts; None for once.
        qmin: smallest integer level, e.g. -8 for int4.
        qmax: largest integer level, e.g. 7 for int4.
        symmetric: range centred on 0, see `choose_qparams`.

    Returns:
        `[C]` fp32, 1 for a row with NaN or Inf.

    Raises:
        ValueError, TypeError: if a tensor is not as above, or qmin >= qmax.
    """
    check_input(WHO, x)
    if x.dim() != 2:
        raise ValueError(f"{WHO}: x must be [C, n], got {list(x.shape)}")
    count = ratios.numel() if isinstance(ratios, Tensor) else 0
    check_tensor(WHO, "ratios", ratios, (torch.float32,), (count,))
    if not count:
        raise ValueError(f"{WHO}: ratios must hold at least one, got none")
    if importance is not None:
        check_tensor(WHO, "importance", importance, (torch.float32,), tuple(x.shape))
    for name, t in {"ratios": ratios, "importance": importance}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{WHO}: {name} must be on the device of x, {x.device}, got {t.device}; move it")
    check_grid(WHO, qmin, qmax)
    tensors = (None if t is None else t.detach().contiguous() for t in (x, ratios, importance))
    return _run(*tensors, qmin, qmax, symmetric)  # type: ignore[no-any-return]
