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
    y = (matrix if transposed else matrix.t()) @ y.reshape(-1, m, power)  # one leading size: quickly traced, if unknown
    for _ in range(power.bit_length() - 1):  # on neighbours: their place becomes the highest bit of the index
        a, b = y[..., ::2], y[..., 1::2]
        y = torch.cat((a + b, a - b), -1)
    y = y.reshape(x.shape) * n**-0.5
    if signs is not None and transposed:
        y = y * signs
    return y.to(x.dtype)


def hadamard_quantize_rows_ref(
    x: Tensor, signs: Tensor | None = None, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows_ref(hadamard_ref(x, signs, block=block))
    return codes, scale
