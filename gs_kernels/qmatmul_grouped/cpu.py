"""Multiplies the rows of each expert by the CPU's product of packed weights, in one call."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.rows import rows_between
from gs_kernels.qmatmul.cpu.float import FloatProduct, without_autocast


def qmatmul_grouped_cpu(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None) -> Tensor:
    n = weight.shape[0] // len(offsets)
    y, first = x.new_empty(x.shape[0], n), 0
    with without_autocast():
        for e, end in enumerate(offsets.tolist()):
            if not first <= end <= x.shape[0]:
                raise ValueError(
                    f"qmatmul_grouped: offsets must not fall, and lie in 0..{x.shape[0]}, the rows of x, got {end} "
                    f"behind {first}, for expert {e}"
                )
            if end > first:
                own, rows = rows_between(weight, e * n, (e + 1) * n), x[first:end]
                offset = None if bias is None else bias[e * n : (e + 1) * n]
                y[first:end] = FloatProduct(own, offset, "none").at(rows.shape, x.dtype)(rows)
                first = end
    y[first:] = 0
    return y
