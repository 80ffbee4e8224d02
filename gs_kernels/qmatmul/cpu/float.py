"""Multiplies with a packed weight on the CPU: chooses the way for a call, and holds those that any call can go.

C++ multiplies codes with rows in whole numbers (row_pieces.h) as it unpacks them. For many rows of fp32 it dequantizes
a stretch of the weight that stays in the cache (interleaved_product.cpp). More than `ROWS` rows of bf16 go to
avx512_bf16.py, where the CPU has its instructions.
Tables of levels and machines without a C++ compiler take plain tensor operations, some rows of the weight at a time: in
fp32 for fp16, which CPUs multiply many times slower, and for bf16 where the CPU has no instructions for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.pack.rows import rows_between
from gs_kernels.qmatmul.cpu import avx512_bf16
from gs_kernels.qmatmul.cpu.interleaved import InterleavedWeight, interleaved
from gs_kernels.qmatmul.cpu.interleaved_product import bind, fixed_product, kernels
from gs_kernels.runtime.instructions import has

logger = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.bfloat16)  # of x and bias, that C++ reads
ROWS = 4  # of bf16 x, that multiply faster in whole numbers
BLOCK = 1 << 21  # elements of a weight that are dequantized at a time

MultipliesFloats: TypeAlias = Callable[[Tensor], Tensor]  # rows `[..., K]` to `[..., N]`


def qmatmul_cpu(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    with without_autocast():
        return FloatProduct(weight, bias, activation).at(x.shape, x.dtype)(x)


class FloatProduct:
    """Prepares `qmatmul` on a CPU: everything but x is fixed; `at` fixes its shape and dtype too."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None, activation: str) -> None:
        self.weight, self.bias, self.activation = weight, bias, activation
        self.interleaved: InterleavedWeight | None = None
        if kernels() is not None:  # else the log says why
            try:
                self.interleaved = interleaved(weight)
            except UnsuitableError as error:
                logger.debug("qmatmul dequantizes in every call: %s", error)

    def at(self, shape: Sequence[int], dtype: torch.dtype) -> MultipliesFloats:
        """Returns the function of x of one shape and dtype, as `qmatmul` has it, outside autocast."""
        weight, m = self.interleaved, math.prod(shape[:-1])
        if weight is None or m == 0:
            return self._plain
        bias, activation = self.bias, self.activation
        computed = dtype if dtype in FLOATS else torch.float32
        in_cpp = activation == "none" and (bias is None or bias.dtype in FLOATS) and computed == dtype
        y_dtype, added = (dtype, bias) if in_cpp else (torch.float32, None)
        in_halves = m > ROWS and dtype == torch.bfloat16 and avx512_bf16.supports(m)
        halves = avx512_bf16.kernels() if in_halves else None
        run = kernels().interleaved_product if halves is None else halves.bf16_product
        added_dtype = None if added is None else added.dtype
        product = fixed_product(weight, computed, y_dtype, added_dtype, x_short=dtype != torch.float32)
        multiply = bind(run, product, shape, y_dtype, weight, added)
        if in_cpp:
            return lambda x: multiply(x.contiguous())
        return lambda x: epilogue(multiply(x.to(computed).contiguous()), bias, activation, dtype)

    def _plain(self, x: Tensor) -> Tensor:
        y = _plain(rows_of(x, computed_in(x.dtype)), self.weight)
        return epilogue(y, self.bias, self.activation, x.dtype).view(*x.shape[:-1], self.weight.shape[0])


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


def _plain(x: Tensor, weight: PackedWeight) -> Tensor:
    """Dequantizes some rows of the weight at a time."""
    n, k = weight.shape
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    size = max(1, BLOCK // k)
    ys = [linear(x, dequantize_packed(rows_between(weight, i, i + size), x.dtype)) for i in range(0, n, size)]
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1)
