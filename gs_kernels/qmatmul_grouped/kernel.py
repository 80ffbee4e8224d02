"""Launches products with the weights of experts, by the kernel of one weight."""

from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.qmatmul.kernel import device_of, rows_of
from gs_kernels.qmatmul.kernel.dequantize import has_table
from gs_kernels.qmatmul.kernel.matmul import multiply
from gs_kernels.qmatmul_grouped.tiles import choose_grouped_plan


def qmatmul_grouped_triton(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None) -> Tensor:
    rows, experts = rows_of(x), offsets.shape[0]
    if rows.shape[0] == 0:
        return x.new_empty(0, weight.shape[0] // experts)
    asm, sm, sm_count = device_of(x)
    sizes = rows.shape[0], experts, weight.shape[0] // experts
    table = has_table(weight)
    plan = choose_grouped_plan(*sizes, x_bits=8 * x.itemsize, levels=table, sm=sm, sm_count=sm_count)
    return multiply(rows, weight, bias, "none", plan, asm, offsets)
