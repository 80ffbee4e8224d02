"""Moves what is added to weights before they are rounded, and the scales, by the sign of the gradient: SignRound."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from gs_algos.quant.packed.grid import Grid
from gs_kernels import PerTensor

LARGEST = 0.5  # of an offset, in steps, and of the change of a scale, as a share of it
SCALES = 0.3  # times the learning rate: that of scales


class SignRound:
    """Tunes `q = (clamp(round(w + V)) - z) s (1 + a)`: an offset V of each weight, a change a of each group's scale.

    Both start at 0, stay in [-0.5, 0.5] and go by `lr (1 - step / steps)` against the sign of their gradient, which
    goes straight through `round`. w, in steps, rounds to the codes of gptq: they are the start.

    Source: Cheng et al. 2023, arXiv:2309.05516.
    Differs from the paper: the codes of gptq are a minimum of the layer's error, from which signs alone walk away, for
    they move every weight however little it would gain. So w is the best value of each weight with all others fixed,
    and an offset moves only while the gradient g asks for a whole step, `|g| >= 2 c s`, and a scale while it asks for
    the step it takes; c is the curvature of the block's error, from probes. Scales may grow, and leave the codes as
    they are; one scale for a whole weight stays.

    lr: None for 1 / steps.
    """

    STEPS: ClassVar[int] = 200
    PROBES: ClassVar[int] = 8
    MIXES: ClassVar[bool] = False

    def __init__(self, grid: Grid, codes: Tensor, fraction: Tensor, steps: int, lr: float | None) -> None:
        self.grid = grid
        self.low, self.high = grid.limits
        self.shape = codes.shape
        self.start = (codes.float() + fraction).view(*grid.scale.shape, -1)  # w, [N, G, size]
        self.offset = torch.zeros_like(self.start)
        self.change = torch.zeros_like(grid.scale)
        self.zero = grid.stored_zero.unsqueeze(-1) if bool(grid.zero.any()) else None
        self.steps, self.done = steps, 0
        self.lr = 1 / steps if lr is None else lr
        self.curvature, self.curvature_of_change = _Product(self.start.view(codes.shape)), _Product(self.change)

    def observe(self, gradient: Tensor) -> None:
        self.curvature.observe(gradient)
        self.curvature_of_change.observe(self._gradient_of_change(gradient))

    def values(self) -> Tensor:
        return self._steps().mul_(self._scale().unsqueeze(-1)).view(self.shape)

    def step(self, gradient: Tensor) -> None:
        lr = self.lr * (1 - self.done / self.steps)
        self.done += 1
        if not isinstance(self.grid.scheme.granularity, PerTensor):
            change = self._gradient_of_change(gradient)
            asked = change.abs() >= self.curvature_of_change.mean() * (SCALES * lr)
            self.change.sub_(change.sign_().mul_(asked), alpha=SCALES * lr).clamp_(-LARGEST, LARGEST)
        least = self.curvature.mean().view(self.start.shape).mul_((2 * self.grid.scale.abs()).unsqueeze(-1))
        gradient = gradient.view(self.start.shape)
        moved = gradient.sign().mul_(gradient.abs() >= least)
        self.offset.addcmul_(moved, self.grid.scale.sign().unsqueeze(-1), value=-lr).clamp_(-LARGEST, LARGEST)

    def rounded(self) -> tuple[Grid, Tensor]:
        codes = self._steps() if self.zero is None else self._steps().add_(self.zero)
        dtype = torch.uint8 if self.low >= 0 else torch.int8
        return replace(self.grid, scale=self._scale()), codes.to(dtype).view(self.shape)

    def _scale(self) -> Tensor:
        """Returns the scales `[N, G]` fp32 as they are stored."""
        return (self.grid.scale * (1 + self.change)).to(self.grid.dtype).float()

    def _steps(self) -> Tensor:
        """Returns the codes less their zero points, `[N, G, size]` fp32."""
        codes = (self.start + self.offset).round_().clamp_(self.low, self.high)
        return codes if self.zero is None else codes.sub_(self.zero)

    def _gradient_of_change(self, gradient: Tensor) -> Tensor:
        """Computes the gradient of a, `[N, G]`."""
        return torch.linalg.vecdot(self._steps(), gradient.view(self.start.shape)).mul_(self.grid.scale)


class _Product:
    """Estimates the mean square of matrices like one as the product of the means of its rows and of its columns."""

    def __init__(self, like: Tensor) -> None:
        self.rows, self.columns = like.new_zeros(len(like), 1), like.new_zeros(1, like.shape[1])
        self.count = 0

    def observe(self, matrix: Tensor) -> None:
        squares = matrix.square()
        self.rows += squares.mean(1, keepdim=True)
        self.columns += squares.mean(0, keepdim=True)
        self.count += 1

    def mean(self) -> Tensor:
        total = self.rows.mean() * max(1, self.count)
        return self.rows * (self.columns / torch.where(total > 0, total, 1.0))
