"""Chooses codes on a grid.

From the statistics of one layer: each way has the form of `Rounding` and an entry in `ROUNDINGS`. Or by gradient, from
the output of a whole block: each has the form of `Tuned` and an entry in `TUNED`, and starts from the codes of `START`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.rounding.adaround import AdaRound
from gs_algos.ptq.rounding.gptq import gptq
from gs_algos.ptq.rounding.nearest import nearest
from gs_algos.ptq.rounding.signround import SignRound
from gs_algos.ptq.rounding.tuned import Tuned
from gs_algos.quant.packed.grid import Grid

# (target [N, K] fp32, grid, hessian with a factor) -> codes [N, K]
Rounding: TypeAlias = Callable[[Tensor, Grid, Hessian], Tensor]
ROUNDINGS: Mapping[str, Rounding] = {"nearest": nearest, "gptq": gptq}
TUNED: Mapping[str, type[Tuned]] = {"signround": SignRound, "adaround": AdaRound}
START = "gptq"
NAMES = (*ROUNDINGS, *TUNED)
