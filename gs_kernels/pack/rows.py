"""Dequantizes chosen rows of a packed weight, as an embedding reads them; on a CPU in C++ (rows.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.checks import check_packed
from gs_kernels.pack.layouts import CANONICAL, PLANAR, PackedWeight
from gs_kernels.pack.pack import dequantize_packed, repack
from gs_kernels.runtime.dispatch import takes_cpu

PARALLEL_FROM = 1 << 15  # elements, from which a second thread pays

_size, _pointer = ctypes.c_int64, ctypes.c_void_p
FUNCTIONS = {
    "packed_rows": (
        *(_pointer, _size, _pointer, _size, _pointer, _pointer),
        *(_size, _size, ctypes.c_int, _pointer, ctypes.c_int),
    )
}


def dequantize_rows(weight: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the real values `[n, K]` of rows `[n]` int32 / int64, as `dequantize_packed` does for all.

    Raises:
        IndexError: if there is no such row; a GPU stops with an assertion.
        TypeError, ValueError: as `dequantize_packed`.
    """
    check_packed("dequantize_rows", weight)
    takes = takes_cpu(rows) and weight.layout == CANONICAL and weight.levels is None
    functions = kernels() if takes else None
    if functions is None:
        return dequantize_packed(rows_of(weight, rows), dtype)
    return _dequantize(functions, weight, rows, dtype)


def _dequantize(functions: Any, weight: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    ids = rows.to(torch.int64).contiguous()
    scale = weight.scale.detach().index_select(0, ids).float()  # which refuses rows that are not there
    zero = weight.zero
    zero = zero.detach().index_select(0, ids).float() if isinstance(zero, Tensor) else torch.full_like(scale, zero)
    codes, (_, k), count = weight.codes.contiguous(), weight.shape, ids.shape[0]
    out = scale.new_empty(count, k)
    threads = torch.get_num_threads() if out.numel() >= PARALLEL_FROM else 1
    functions.packed_rows(
        *(ids.data_ptr(), count, codes.data_ptr(), codes.shape[1], scale.data_ptr(), zero.data_ptr()),
        *(k, weight.group_size, weight.bits, out.data_ptr(), threads),
    )
    return out.to(dtype)


def rows_between(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Views the rows from start to stop of a packed weight, without a copy of its codes."""
    if start == 0 and stop >= weight.shape[0]:
        return weight
    codes = weight.codes[start:stop] if weight.layout == CANONICAL else weight.codes[:, start:stop]
    zero = weight.zero[start:stop] if isinstance(weight.zero, Tensor) else weight.zero
    scale, divisor = weight.scale[start:stop], weight.divisor
    if divisor is not None and divisor.shape[0] > 1:
        each = weight.shape[0] // divisor.shape[0]
        first, last = start // each, -(-stop // each)
        whole = last - first == 1 or (start % each == 0 and stop % each == 0)
        divisor = divisor[first:last] if whole else divisor.repeat_interleave(each)[start:stop]
    shape = (scale.shape[0], weight.shape[1])
    return replace(weight, codes=codes, scale=scale, zero=zero, divisor=divisor, shape=shape)


def stack_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Puts packed weights of one form below one another, canonical: those of experts, or parts of one.

    Raises:
        ValueError: if their bits, groups, inputs, levels or dtypes differ.
    """
    first = weights[0]
    divisors = [weight.divisor for weight in weights]
    for weight in weights:
        same = weight.bits == first.bits and weight.group_size == first.group_size and weight.shape == first.shape
        table = (weight.levels is None) == (first.levels is None)
        if not same or not table or (weight.divisor is None) != (first.divisor is None):
            raise ValueError(
                f"stack_rows: weights must have one form, got {first.bits} bits of {list(first.shape)} in groups of "
                f"{first.group_size} and {weight.bits} of {list(weight.shape)} in groups of {weight.group_size}"
            )
        if first.levels is not None and not torch.equal(weight.levels, first.levels):  # type: ignore[arg-type]
            raise ValueError("stack_rows: weights must have the same levels, got different ones")
    zeros = [weight.zero for weight in weights]
    one = not any(isinstance(zero, Tensor) for zero in zeros) and len(set(zeros)) == 1
    zero = zeros[0] if one else torch.cat([_points(weight) for weight in weights])
    return replace(
        first,
        codes=torch.cat([repack(weight, CANONICAL).codes for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights]),
        zero=zero,
        divisor=None if first.divisor is None else torch.cat([d for d in divisors if d is not None]),
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
        layout=CANONICAL,
    )


def _points(weight: PackedWeight) -> Tensor:
    return weight.zero if isinstance(weight.zero, Tensor) else torch.full_like(weight.scale, weight.zero)


def rows_of(weight: PackedWeight, rows: Tensor) -> PackedWeight:
    """Selects rows of a packed weight, `rows [n]` of int32 / int64."""
    divisor = weight.divisor
    if divisor is not None and divisor.shape[0] > 1:
        divisor = divisor.index_select(0, rows // (weight.shape[0] // divisor.shape[0]))
    return replace(
        weight,
        codes=weight.codes.index_select(1 if weight.layout == PLANAR else 0, rows),
        scale=weight.scale.index_select(0, rows),
        zero=weight.zero.index_select(0, rows) if isinstance(weight.zero, Tensor) else weight.zero,
        shape=(rows.shape[0], weight.shape[1]),
        divisor=divisor,
    )


@cache
def kernels() -> Any:
    """Returns the compiled functions, or None if they were not built or fail the self-test."""
    return load_functions("rows of packed weights", FUNCTIONS, self_test)


def self_test(functions: Any) -> bool:
    """Checks one small weight of each width."""
    return all(_self_test_of(functions, bits) for bits in (1, 2, 4, 8))


def _self_test_of(functions: Any, bits: int) -> bool:
    codes = torch.arange(5 * 4 * bits, dtype=torch.int32).mul(37).to(torch.uint8).view(5, -1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields = ((codes.unsqueeze(2) >> shifts) & (2**bits - 1)).flatten(1)  # [5, 32]
    scale, zero = torch.arange(10).view(5, 2) * 0.5, torch.arange(10).view(5, 2) * 0.25
    weight = PackedWeight(codes, scale, zero, None, bits, (5, 32), 16)
    want = (fields.float() - zero.repeat_interleave(16, 1)) * scale.repeat_interleave(16, 1)
    rows = torch.tensor([4, 0, 4])
    return torch.equal(_dequantize(functions, weight, rows, torch.float32), want[rows])
