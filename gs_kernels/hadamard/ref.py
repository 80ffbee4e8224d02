"""Computes what hadamard does, in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.hadamard.matrices import factors, hadamard_block, small_rows
from gs_kernels.qmatmul.ref import quantize_rows_ref


def hadamard_ref(
    x: Tensor, signs: Tensor | None = None, *, block: int | None = None, transposed: bool = False
) -> Tensor:
    n = block or hadamard_block(x.shape[-1])
    m, power = factors(n) or (n, 1)
    matrix = torch.tensor(small_rows(m), dtype=torch.float32, device=x.device)
    y = x.float()
    if signs is not None and not transposed:
        y = y * signs
    y = y.unflatten(-1, (-1, m, power))
    y = torch.einsum("...ip,ij->...jp", y, matrix.t() if transposed else matrix)
    half = 1
    while half < power:  # sums and differences of elements that are `half` apart
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    y = y.flatten(-3) * n**-0.5
    if signs is not None and transposed:
        y = y * signs
    return y.to(x.dtype)


def hadamard_quantize_rows_ref(
    x: Tensor, signs: Tensor | None = None, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows_ref(hadamard_ref(x, signs, block=block))
    return codes, scale
