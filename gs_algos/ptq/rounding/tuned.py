"""Says what a rounding that is tuned by gradient, on the output of a whole block, has to give."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.quant.packed.grid import Grid


class Tuned(Protocol):
    """Holds what is tuned of one weight `[N, K]`, from the grid and codes that another rounding found.

    STEPS: that are taken unless the user says how many.
    PROBES: that `observe` is to be told of before the first step.
    MIXES: whether each element of the block's input is that of the quantized or of the float network at random.
    """

    STEPS: ClassVar[int]
    PROBES: ClassVar[int]
    MIXES: ClassVar[bool]

    def __init__(self, grid: Grid, codes: Tensor, fraction: Tensor, steps: int, lr: float | None) -> None: ...

    @staticmethod
    def fraction(target: Tensor, grid: Grid, codes: Tensor, hessian: Hessian | None) -> Tensor:
        """Returns how many steps above its code each weight would best be, `[N, K]`, less than half a step.

        Args:
            target: W* `[N, K]` fp32.
            hessian: of the layer; None if it saw no row.
        """
        ...

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


def in_steps(values: Tensor, grid: Grid) -> Tensor:
    """Divides `[N, K]` by the scales of its groups; by those that are 0 to 0."""
    groups = values.view(*grid.scale.shape, -1)
    scale = grid.scale.unsqueeze(-1)
    return (groups / scale).masked_fill_(scale == 0, 0.0).view(values.shape)
