"""Multiplies with a packed weight on the CPU: chooses the way for a call, and holds those that any call can go.

Up to `ROWS` rows of x (or `FEW_ROWS`), C++ multiplies codes as it unpacks them, in fp32: nothing is dequantized in
memory. More rows of bf16 go to avx512_bf16.py, where the CPU has its instructions. Elsewhere blocks of the weight that
fit the cache are dequantized one after the other and multiplied by ATen.
Tables of levels and machines without a C++ compiler take plain tensor operations, block by block too.

fp16 is computed in fp32: CPUs multiply it many times slower. bf16 is, where the CPU has no instructions for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qmatmul.cpu import avx512_bf16
from gs_kernels.qmatmul.cpu.interleaved import LANES, STEP, InterleavedWeight, interleaved
from gs_kernels.qmatmul.cpu.interleaved_product import dot, unpack
from gs_kernels.runtime.instructions import has

logger = logging.getLogger(__name__)

ROWS = 4  # of bf16 x, that multiply as fast in fp32
BLOCK = 1 << 21  # elements of a weight that are dequantized at a time
# measured, 2 threads, 4096 x 4096: above, a dequantized block and ATen's product take less time
FEW_ROWS = {torch.bfloat16: 16, torch.float32: 64}


def qmatmul_cpu(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    with without_autocast():
        rows, y = rows_of(x, computed_in(x.dtype)), None
        if rows.shape[0] and weight.levels is None:
            try:
                # the way of few rows without frames in between, which small ones feel
                y = dot(rows.float(), interleaved(weight)) if _are_few(rows) else _many(rows, weight)
            except UnsuitableError as error:
                logger.debug("qmatmul dequantizes in every call: %s", error)
        y = _plain(rows, weight) if y is None else y[:, : weight.shape[0]]
    return epilogue(y, bias, activation, x.dtype).view(*x.shape[:-1], weight.shape[0])


def without_autocast() -> AbstractContextManager[Any]:
    """Returns a context without autocast, which would change dtypes."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshapes x to `[M, K]`, contiguous."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def epilogue(y: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """Adds bias and applies the activation in fp32, then casts once; contiguous."""
    if bias is not None:
        y = y.float() + bias.float()
    return ACTIVATIONS[activation].function(y).to(dtype).contiguous()


@cache
def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a CPU multiplies fast: fp32 for fp16, and for bf16 without instructions for it."""
    able = any(has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype if dtype == torch.bfloat16 and able else torch.float32


def _are_few(x: Tensor) -> bool:
    """Says whether the codes of the weight are multiplied as they are unpacked, in fp32."""
    m = x.shape[0]
    if m > ROWS and x.dtype == torch.bfloat16 and avx512_bf16.supports(m):
        return False
    return m <= FEW_ROWS[x.dtype]


def _many(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiplies many rows x; returns `[M, N or more]`, in fp32 or the dtype of x."""
    if x.dtype == torch.bfloat16 and avx512_bf16.supports(x.shape[0]):
        try:
            return avx512_bf16.multiply(x, interleaved(weight))
        except UnsuitableError as error:
            logger.debug("qmatmul goes another way: %s", error)
            if x.shape[0] <= FEW_ROWS[x.dtype]:
                return dot(x.float(), interleaved(weight))
    return _by_blocks(x, weight)


def _by_blocks(x: Tensor, weight: PackedWeight) -> Tensor:
    blocks = interleaved(weight)
    steps = blocks.steps(x).flatten(1)
    y = x.new_empty(x.shape[0], blocks.codes.shape[0] * LANES)
    done = 0
    for block, _ in dequantized(blocks, x.dtype, BLOCK):
        columns = block.view(steps.shape[1], -1)
        torch.mm(steps, columns, out=y[:, done : done + columns.shape[1]])
        done += columns.shape[1]
    return y


def dequantized(
    weight: InterleavedWeight, dtype: torch.dtype, size: int, as_codes: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields blocks of the weight and their grids, as `unpack` makes them: each overwrites the one before.

    About `size` elements at a time, at least two blocks of rows. Memory taken anew for each would cost more in page
    faults than the passes that fill it.
    """
    count, *steps = weight.codes.shape[:3]
    pieces = max(1, min(count // 2, count * LANES * weight.groups * weight.width // size))
    buffer = torch.empty(*steps, STEP, -(-count // pieces), LANES, dtype=dtype)
    for codes, grid in zip(weight.codes.tensor_split(pieces), weight.grid.tensor_split(pieces), strict=True):
        block = buffer.flatten()[: codes.shape[0] * buffer[..., 0, :].numel()].view(*steps, STEP, -1, LANES)
        unpack(codes, grid, weight.bits, block, as_codes)
        yield block, grid


def _plain(x: Tensor, weight: PackedWeight) -> Tensor:
    """Dequantizes some rows of the weight at a time."""
    n, k = weight.shape
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    size = max(1, BLOCK // k)
    ys = [linear(x, dequantize_packed(_slice(weight, i, i + size), x.dtype)) for i in range(0, n, size)]
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1)


def _slice(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    if start == 0 and stop >= weight.shape[0]:
        return weight
    codes = weight.codes[start:stop] if weight.layout == CANONICAL else weight.codes[:, start:stop]
    zero = weight.zero[start:stop] if isinstance(weight.zero, Tensor) else weight.zero
    scale = weight.scale[start:stop]
    return replace(weight, codes=codes, scale=scale, zero=zero, shape=(scale.shape[0], weight.shape[1]))
