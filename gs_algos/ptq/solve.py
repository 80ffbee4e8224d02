"""Finds the codes of one layer: target, grid, rounding, refinement."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gs_algos.core.input_statistics import InputStatistics
from gs_algos.ptq.hessian import ORDERS, Hessian, hessian_of
from gs_algos.ptq.refine import refine
from gs_algos.ptq.rounding import ROUNDINGS
from gs_algos.ptq.target import corrected, damping
from gs_algos.quant.packed.grid import Grid, grid_of, group_size
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight

UNSEEN = "saw no token: rounded to nearest"
LENT = "saw {count:,} tokens: all those of its block count as {lent:,} more"


@dataclass(frozen=True)
class SolveOptions:
    """Says how codes are chosen.

    Args:
        rounding: `nearest` or `gptq`.
        correct: 0..1, share of the correction for what layers before lost; nothing without a cross term.
        refine: rounds of scale refit and coordinate descent after the rounding.
        order: of the columns in gptq: `act`, `group` or `none`.
        damp: times the mean of the diagonal of H; None for max(.01, K / (4 T)), T tokens.
        positive: scales are > 0, and stored in fp32, as layers that multiply integers take them.

    Raises:
        ValueError: if one is out of its range.
    """

    rounding: str = "gptq"
    correct: float = 0.5
    refine: int = 2
    order: str = "act"
    damp: float | None = None
    positive: bool = False

    def __post_init__(self) -> None:
        check_options(self, "SolveOptions")


def check_options(options: Any, who: str, roundings: Collection[str] = tuple(ROUNDINGS)) -> None:
    """Raises ValueError unless `rounding`, `order`, `correct`, `refine` and `damp` of an object are in their ranges."""
    for name, known in (("rounding", roundings), ("order", ORDERS)):
        value = getattr(options, name)
        if value not in known:
            raise ValueError(f"{who}: {name} must be one of {', '.join(known)}, got {value!r}")
    correct, refine, damp = options.correct, options.refine, options.damp
    if type(correct) not in (int, float) or not 0 <= correct <= 1:
        raise ValueError(f"{who}: correct must be in [0, 1], got {correct!r}")
    if type(refine) is not int or refine < 0:
        raise ValueError(f"{who}: refine must be a whole number of rounds, >= 0, got {refine!r}")
    if damp is not None and (type(damp) not in (int, float) or not 0 < damp <= 1):
        raise ValueError(f"{who}: damp must be above 0 and at most 1, or None, got {damp!r}")


@dataclass(frozen=True)
class Solution:
    """Holds what `solve` found.

    Args:
        grid: of the weight.
        codes: `[N, K]`, as `grid.codes` gives them.
        target: W* `[N, K]` fp32, that the codes aim at.
        objective: `tr((Q - W*) H (Q - W*)^T)` of the weight Q, over all tokens, without damping; 0 without a token.
        nearest: the same of the weight rounded to nearest, as `round_to_nearest` does.
        notes: what a report should say.
        hessian: of the layer's input; None without a token.
    """

    grid: Grid
    codes: Tensor
    target: Tensor
    objective: float
    nearest: float
    notes: tuple[str, ...] = ()
    hessian: Hessian | None = None

    @property
    def weight(self) -> PackedWeight:
        """Packs the weight, canonical, on the device of the float one."""
        return self.grid.packed(self.codes)


@torch.no_grad()
def solve(
    weight: Tensor, statistics: InputStatistics, scheme: Scheme, options: SolveOptions, who: str = "solve"
) -> Solution:
    """Quantizes one weight so that its layer's output over the tokens of `statistics` changes least.

    The target is `W* = W + correct W C (H + damping)^-1`, its grid is fixed by the scheme's observer, codes follow by
    `rounding`, and `refine` improves both. A column whose input was always 0 is rounded to nearest, since other inputs
    may not be 0 there. Without a token, or if no damping gives a factor of H, codes are those of round to nearest, and
    a note says so.

    Args:
        weight: `[N, K]` fp32 / fp16 / bf16, or of a grouped convolution `[groups, N / groups, K]`.
        statistics: of the layer's input, the same object for all layers that read it: they share its factor.
        scheme: of 1 to 8 bits; 3 bits are stored in 4.
        options: see `SolveOptions`.
        who: the layer's name, for errors.

    Raises:
        ValueError: if weight and statistics do not fit, one of them is not finite, or the group does not divide K.
    """
    _refuse(weight, statistics, scheme, who)
    k = statistics.columns
    rows = weight.detach().reshape(-1, k).float()
    if statistics.weight == 0:
        grid = grid_of(rows, scheme, weight.dtype, positive=options.positive)
        return Solution(grid, grid.codes(rows), rows, 0.0, 0.0, (UNSEEN,))
    damp = damping(statistics, options.damp, k)
    hessian = hessian_of(statistics, damp, options.order, group_size(scheme, k))
    rounding = options.rounding if hessian.factor is not None else "nearest"
    target = corrected(rows, statistics, options.correct, hessian)
    counts = _importance(statistics, len(rows)) if rounding == "nearest" else None
    grid = grid_of(target, scheme, weight.dtype, counts, options.positive)
    same = rounding != "nearest" and torch.equal(target, rows)
    plain = grid if same else grid_of(rows, scheme, weight.dtype, positive=options.positive)
    nearest = hessian.loss(plain.values(plain.codes(rows)) - target)
    codes = ROUNDINGS[rounding](target, grid, hessian)
    damped = None
    if hessian.factor is not None:
        grid, codes, damped = refine(target, grid, codes, hessian, options.refine)
    loss = hessian.loss(grid.values(codes) - target, damped)
    lent = (LENT.format(count=statistics.count, lent=statistics.lent),) if statistics.lent else ()
    return Solution(grid, codes, target, loss, nearest, (*lent, *hessian.notes), hessian)


def _importance(statistics: InputStatistics, n: int) -> Tensor:
    """Returns how much an error in each weight counts, `[N, K]`: the diagonal of H; 1 where it is 0."""
    diagonal = statistics.gram.diagonal(dim1=1, dim2=2)
    counts = torch.where(diagonal == 0, 1.0, diagonal)
    return counts.unsqueeze(1).expand(-1, n // statistics.groups, -1).reshape(n, -1)


def _refuse(weight: Tensor, statistics: InputStatistics, scheme: Scheme, who: str) -> None:
    groups, k = statistics.groups, statistics.columns
    fits = weight.dim() in (2, 3) and weight.shape[-1] == k and weight.numel() > 0
    if weight.dim() == 3:
        fits = fits and weight.shape[0] == groups
    elif fits:
        fits = weight.shape[0] % groups == 0
    if not fits:
        must = f"[N, {k}]" if groups == 1 else f"[{groups}, n, {k}] or [{groups} * n, {k}]"
        raise ValueError(f"{who}: weight must be {must}, as its statistics are, got {list(weight.shape)}")
    if k % group_size(scheme, k):
        raise ValueError(f"{who}: the group must divide the {k} inputs, got {scheme}")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{who}: weights must be finite, got NaN or Inf")
    statistics.check(who)
