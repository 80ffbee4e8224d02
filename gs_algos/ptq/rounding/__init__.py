"""Chooses codes on a grid: every way has the form of `Rounding` and an entry in `ROUNDINGS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.rounding.gptq import gptq
from gs_algos.ptq.rounding.nearest import nearest
from gs_algos.quant.packed.grid import Grid

# (target [N, K] fp32, grid, hessian with a factor) -> codes [N, K]
Rounding: TypeAlias = Callable[[Tensor, Grid, Hessian], Tensor]
ROUNDINGS: Mapping[str, Rounding] = {"nearest": nearest, "gptq": gptq}
