"""Multiplies with Hadamard matrices on a CPU: a product with each of their Kronecker factors, of at most 128 or m."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gs_kernels.hadamard.matrices import factors, hadamard_block, hadamard_matrix
from gs_kernels.qmatmul.cpu.quantize_rows import quantize_rows_cpu

MOST_BITS = 7  # of the order of a factor: 128


@cache
def kronecker_factors(n: int) -> tuple[Tensor, ...]:
    """Returns matrices whose Kronecker product is that of order n, each as large as a product of matrices wants it."""
    m, power = factors(n) or (n, 1)
    bits = power.bit_length() - 1
    count = -(-bits // MOST_BITS)
    sizes = [2 ** ((bits + i) // count) for i in range(count)]
    found = [hadamard_matrix(m)] if m > 1 or not sizes else []
    return (*found, *(hadamard_matrix(size) for size in sizes))


def hadamard_cpu(x: Tensor, signs: Tensor | None, block: int, transposed: bool) -> Tensor:
    block = block or hadamard_block(x.shape[-1])
    y = x.float()
    if signs is not None and not transposed:
        y = y * signs
    *others, last = kronecker_factors(block)
    y = y.reshape(-1, len(last)) @ (last.t() if transposed else last)
    inner = len(last)
    for matrix in reversed(others):
        y = (matrix if transposed else matrix.t()) @ y.view(-1, len(matrix), inner)
        inner *= len(matrix)
    y = y.view(x.shape).mul_(block**-0.5)
    if signs is not None and transposed:
        y *= signs
    return y.to(x.dtype)


def hadamard_quantize_rows_cpu(x: Tensor, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    return quantize_rows_cpu(hadamard_cpu(x, signs, block, False), torch.int8)
