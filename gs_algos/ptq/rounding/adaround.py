"""Learns for each weight whether it is rounded up or down: AdaRound."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gs_algos.quant.packed.grid import Grid

STRETCH, SHIFT = 1.2, -0.1  # of the sigmoid, so that it reaches 0 and 1
WEIGHT = 0.01  # of the term that drives h to 0 or 1
WARM_UP = 0.2  # share of the steps without it
FIRST_BETA, LAST_BETA = 20.0, 2.0
MOMENTS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
WAY = 8.0  # that a V can go in all steps
FIXED = -10.0  # a V whose h is 0, and so is its gradient


class AdaRound:
    """Tunes `q = (floor(w) + h - z) s`, `h = clamp(1.2 sigmoid(V) - 0.1, 0, 1)`, by Adam; h >= 0.5 rounds up.

    h starts at the fraction. The loss has `0.01 sum(1 - |2 h - 1|^b)` more after a fifth of the steps, b from 20 to 2
    by a cosine. A weight that is on its grid stays there.

    Source: Nagel et al. 2020, arXiv:2004.10568.
    Differs from the paper: w, in steps, is not the weight but the best value of each with the codes of gptq for all
    others, and rounds to them: they are the start. From the fractions of the weights the loss was 15 times as large,
    and stayed above that of gptq.

    lr: None for 8 / steps: the fewer steps, the larger.
    """

    STEPS: ClassVar[int] = 2000
    PROBES: ClassVar[int] = 0
    MIXES: ClassVar[bool] = True

    def __init__(self, grid: Grid, codes: Tensor, fraction: Tensor, steps: int, lr: float | None) -> None:
        self.grid, self.dtype = grid, codes.dtype
        low, high = grid.limits
        whole = codes.float()
        beyond = ((whole == high) & (fraction > 0)) | ((whole == low) & (fraction < 0))
        fraction = fraction.masked_fill(beyond, 0.0)
        self.floor = whole - (fraction < 0).float()
        logit = torch.logit(((fraction % 1) - SHIFT) / STRETCH)
        self.v = logit.masked_fill_(fraction == 0, FIXED)
        self.first, self.second = torch.zeros_like(self.v), torch.zeros_like(self.v)
        size = codes.shape[1] // grid.scale.shape[1]
        self.scale = grid.scale.repeat_interleave(size, 1)
        self.floor_values = grid.values(self.floor)
        self.steps, self.done = steps, 0
        self.lr = WAY / steps if lr is None else lr

    def observe(self, gradient: Tensor) -> None:
        pass

    def values(self) -> Tensor:
        return torch.addcmul(self.floor_values, self._up(torch.sigmoid(self.v)), self.scale)

    def step(self, gradient: Tensor) -> None:
        sigmoid = torch.sigmoid(self.v)
        up = self._up(sigmoid)
        slope = sigmoid.mul_(1 - sigmoid).mul_(STRETCH).masked_fill_((up == 0) | (up == 1), 0.0)
        gradient = gradient * self.scale
        if self.beta is not None:
            side = 2 * up - 1
            gradient += side.abs().pow_(self.beta - 1).mul_(side.sign_()).mul_(-2 * self.beta * WEIGHT)
        gradient *= slope
        self.done += 1
        self.first.lerp_(gradient, 1 - MOMENTS[0])
        self.second.mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
        first, second = (1 - moment**self.done for moment in MOMENTS)
        self.v.addcdiv_(self.first, (self.second / second).sqrt_().add_(EPSILON), value=-self.lr / first)

    def rounded(self) -> tuple[Grid, Tensor]:
        up = self._up(torch.sigmoid(self.v)) >= 0.5
        return self.grid, (self.floor + up).to(self.dtype)

    @property
    def beta(self) -> float | None:
        """Returns the power of the term that drives h to 0 or 1; None while it is not there."""
        begun = self.done / self.steps - WARM_UP
        if begun < 0:
            return None
        cosine = math.cos(math.pi * begun / (1 - WARM_UP))
        return LAST_BETA + (FIRST_BETA - LAST_BETA) * 0.5 * (1 + cosine)

    @staticmethod
    def _up(sigmoid: Tensor) -> Tensor:
        """Computes h."""
        return (sigmoid * STRETCH).add_(SHIFT).clamp_(0, 1)
