"""Says what a rounding that is tuned by gradient, on the output of a whole block, has to give."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.quant.packed.grid import Grid

MOST = 0.499  # steps that a weight may be from its code at the start: at 0.5 it would be between two


class Tuned(Protocol):
    """Holds what is tuned of one weight `[N, K]`, from the grid and codes that another rounding found.

    fraction: see `fraction_of`.
    STEPS: that are taken unless the user says how many.
    PROBES: that `observe` is to be told of before the first step.
    MIXES: whether each element of the block's input is that of the quantized or of the float network at random.
    """

    STEPS: ClassVar[int]
    PROBES: ClassVar[int]
    MIXES: ClassVar[bool]

    def __init__(self, grid: Grid, codes: Tensor, fraction: Tensor, steps: int, lr: float | None) -> None: ...

    def observe(self, gradient: Tensor) -> None:
        """Takes a probe: the gradient `[N, K]` fp32 of `sum(v y) / sqrt(elements of y)`, v = ±1 at random."""
        ...

    def values(self) -> Tensor:
        """Returns the weight `[N, K]` fp32 that the block is run with."""
        ...

    def step(self, gradient: Tensor) -> None:
        """Moves what is tuned against the gradient `[N, K]` fp32 of the mean squared error by the last `values`."""
        ...

    def rounded(self) -> tuple[Grid, Tensor]:
        """Returns the grid and the codes `[N, K]` that it stands for now."""
        ...


def fraction_of(target: Tensor, grid: Grid, codes: Tensor, hessian: Hessian | None) -> Tensor:
    """Returns how many steps above its code each weight would best be, all others fixed: `[N, K]`, at most 0.499.

    It is `-(E H)_j / (H_jj s)`, E = Q - W*: codes of coordinate descent are at most half a step away.

    Args:
        target: W* `[N, K]` fp32.
        grid: of the codes.
        codes: `[N, K]`.
        hessian: of the layer, here with its damping; None if it saw no row: then each weight is best at its target.
    """
    error = grid.values(codes) - target
    if hessian is not None:
        pull = error.view(len(hessian.damped), -1, error.shape[1]) @ hessian.damped
        error = (pull / hessian.damped.diagonal(dim1=1, dim2=2).unsqueeze(1)).view(error.shape)
    scale = grid.scale.unsqueeze(-1)
    steps = -error.view(*grid.scale.shape, -1) / scale
    return steps.masked_fill_(scale == 0, 0.0).clamp_(-MOST, MOST).view(error.shape)
