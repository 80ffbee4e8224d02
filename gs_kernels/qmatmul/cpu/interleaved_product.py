"""Calls `interleaved_product.cpp`: multiplies with a row-interleaved weight, or dequantizes blocks of it.

It takes `codes [B, G, W, 16]`, `grid [B, G, 32]` and rows of x as interleaved.py has them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.qmatmul.cpu.interleaved import LANES, WORD, InterleavedWeight

PARALLEL_FROM = 1 << 15  # products, from which a second thread pays

size, number, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
PRODUCT = (pointer, pointer, size, pointer, pointer, number)  # what is fixed, x, rows, bias, y, threads
WEIGHT = (pointer, pointer, size, size, size, number)  # codes, grid, blocks, groups, words, bits
FUNCTIONS = {
    "interleaved_product": PRODUCT,
    "interleaved_int_dot": (pointer, size, pointer, *WEIGHT, number, pointer, number),
}


class _Weight(ctypes.Structure):
    _fields_ = [("codes", pointer), ("grid", pointer), ("blocks", size), ("groups", size), ("words", size)]


class _Product(ctypes.Structure):
    _fields_ = [
        *(("w", _Weight), ("n", size), ("k", size), ("group", size)),
        *((name, ctypes.c_int32) for name in ("bits", "x_bf16", "y_bf16", "bias_bf16", "x_short")),
    ]


@cache
def kernels() -> Any:
    """Returns the compiled functions, or None if they do not compile or fail the self-test."""
    return load_functions("qmatmul", FUNCTIONS, self_test, (_Product,))


def _functions() -> Any:
    functions = kernels()
    if functions is None:
        raise UnsuitableError("interleaved_product.cpp does not run")  # the log says why
    return functions


def fixed_product(
    weight: InterleavedWeight,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    x_short: bool = False,
) -> ctypes.Structure:
    """Returns what C++ takes as a `Product`, its dtypes fp32 or bf16; it does not keep the weight alive.

    Args:
        x_short: x in fp32 has come from 16-bit floats: it may be rounded to 16 bits below the largest of a group, where
            what is lost is small beside what a bf16 result loses (row_pieces.h). So is x in bf16.
    """
    n, k = weight.shape
    fixed = _Weight(weight.codes.data_ptr(), weight.grid.data_ptr(), *weight.codes.shape[:3])
    half = torch.bfloat16
    halves = x_dtype == half, y_dtype == half, bias_dtype == half
    return _Product(fixed, n, k, k // weight.groups, weight.bits, *halves, x_short or x_dtype == half)


def bind(
    run: Any,
    product: ctypes.Structure,
    shape: Sequence[int],
    y_dtype: torch.dtype,
    weight: InterleavedWeight,
    bias: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Returns the function that multiplies x `[..., K]` of a shape with the weight to `[..., N]`, summed in fp32.

    Args:
        run: `interleaved_product` of `kernels()`, or what takes the same.
        product: `fixed_product` of the weight, and of the dtypes of contiguous x, the result and the bias.
        y_dtype: that the sums, the bias added, are rounded to once.
    """
    (n, k), m = weight.shape, math.prod(shape[:-1])
    like = torch.empty((*shape[:-1], n), dtype=y_dtype, device="cpu")
    held, parallel = (product, weight), m * n * k >= PARALLEL_FROM
    like.untyped_storage().resize_(0)  # `torch.empty_like` takes half the time of `torch.empty`
    at = ctypes.addressof(product)

    def multiply(x: Tensor, held: object = held) -> Tensor:
        y = torch.empty_like(like)
        offset = None if bias is None else bias.contiguous()  # which its owner may have replaced
        where = None if offset is None else offset.data_ptr()
        run(at, x.data_ptr(), m, where, y.data_ptr(), torch.get_num_threads() if parallel else 1)
        return y

    return multiply


def int_dot_of(m: int, weight: InterleavedWeight, one: bool, functions: Any = None) -> Callable[[Tensor], Tensor]:
    """Returns the function that multiplies int16 x `[m, K]` with the weight to fp32 `[m, 16 * B]`.

    Products are summed as integers within each group; one: there is one scale a row, so that all is summed before it is
    scaled.

    Raises:
        UnsuitableError: if the C++ does not run here.
    """
    run = (_functions() if functions is None else functions).interleaved_int_dot
    like = torch.empty(m, weight.codes.shape[0] * LANES, dtype=torch.float32, device="cpu")
    arguments = _arguments(weight)
    parallel = like.numel() * weight.width * weight.groups >= PARALLEL_FROM
    like.untyped_storage().resize_(0)  # `torch.empty_like` takes half the time of `torch.empty`

    def multiply(x: Tensor) -> Tensor:
        rows, y = weight.padded(x).contiguous(), torch.empty_like(like)
        x_sums = rows.sum(2, dtype=torch.int32)  # [M, G]
        threads = torch.get_num_threads() if parallel else 1
        run(rows.data_ptr(), m, x_sums.data_ptr(), *arguments, one, y.data_ptr(), threads)
        return y

    return multiply


def _arguments(weight: InterleavedWeight) -> tuple[int, ...]:
    return weight.codes.data_ptr(), weight.grid.data_ptr(), *weight.codes.shape[:3], weight.bits


def self_test(functions: Any) -> bool:
    """Checks one small weight of each width, exact in fp32 and in bf16."""
    return all(_self_test_of(functions, bits) for bits in (1, 2, 4, 8))


def _self_test_of(functions: Any, bits: int) -> bool:
    per_word = WORD // bits
    codes = torch.arange(3 * 2 * 2 * LANES).mul(0x2545F491).to(torch.int32).view(3, 2, 2, LANES)  # 2 groups of 2 words
    zero = 2.0 ** (bits - 1)
    grid = torch.tensor([0.5, zero]).repeat_interleave(LANES).repeat(3, 2, 1)
    k = 4 * per_word
    interleaved = InterleavedWeight(codes, grid, bits, (48, k), k // 2)
    shifts = torch.tensor([16 * (j % 2) + bits * (j // 2) for j in range(per_word)])
    fields = codes.unsqueeze(-1) >> shifts & 2**bits - 1  # [block, group, word, row, code]
    dense = (fields.permute(1, 2, 4, 0, 3).reshape(k, 48).float() - zero) * 0.5
    x = (torch.arange(7 * k) % 7 - 3).view(7, k)
    want = x.float() @ dense
    run = functions.interleaved_product
    return all(
        torch.equal(bind(run, fixed_product(interleaved, t, t), (m, k), t, interleaved)(x[:m].to(t)), want[:m].to(t))
        for m in (1, 3, 7)
        for t in (torch.float32, torch.bfloat16)
    ) and all(torch.equal(int_dot_of(7, interleaved, one, functions)(x.short()), want) for one in (False, True))
