"""Requantizes on a CPU: one pass over memory in C++, three with an activation that it does not know, or operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.program.recording import noted
from gs_kernels.requantize.grid import Grid, make_grid
from gs_kernels.requantize.passes import sum_codes_of, to_codes_of
from gs_kernels.requantize.ref import requantize_ref

Operand: TypeAlias = tuple[Tensor, Grid]
AddsCodes: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]


def requantize_cpu(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor | None,
    b_scale: Tensor | None,
    b_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    other = None if b is None or b_scale is None or b_zero is None else (b, make_grid(b_scale, b_zero))
    out_grid = None if out_scale is None or out_zero is None else make_grid(out_scale, out_zero, qmin, qmax)
    return add_codes((a, make_grid(a_scale, a_zero)), other, activation, dtype, out_grid)


def _in_order_of(like: Tensor, x: Tensor) -> Tensor:
    """Copies x into the memory order that `empty_like` gives a tensor like another one."""
    strides = torch.empty_like(like).stride()
    return noted(lambda x: x.new_empty_strided(x.shape, strides).copy_(x), x)


def add_codes(a: Operand, b: Operand | None, activation: str, dtype: torch.dtype, out_grid: Grid | None) -> Tensor:
    """Computes `requantize` of eager tensors on a CPU, whose grids are known."""
    codes, grid = a
    other, other_grid = (None, None) if b is None else b
    if codes.numel() == 0:
        return torch.empty_like(codes, dtype=dtype if out_grid is None else torch.int8)
    if not is_dense(codes):
        codes = _in_order_of(codes, codes)
    if other is not None and other.stride() != codes.stride():
        other = _in_order_of(codes, other)
    in_cpp = pass_of(grid, other_grid, activation, dtype, out_grid)
    if in_cpp is not None:
        return in_cpp(codes, other)
    sums = pass_of(grid, other_grid, "none", dtype, None)
    if sums is None:
        return _in_operations(codes, grid, other, other_grid, activation, dtype, out_grid)
    y = noted(ACTIVATIONS[activation].function, sums(codes, other))  # one that C++ does not know
    if out_grid is None or out_grid.numbers is None:
        return y
    to_codes = to_codes_of(y.numel(), out_grid.numbers.to_codes, 0)
    assert to_codes is not None
    return to_codes(y)


def pass_of(
    grid: Grid, other: Grid | None, activation: str, dtype: torch.dtype, out_grid: Grid | None
) -> AddsCodes | None:
    """Returns what adds dense tensors with equal strides in one pass of C++; None where that does not run."""
    if dtype != torch.float32 or any(one is not None and one.numbers is None for one in (grid, other, out_grid)):
        return None
    first, second, out = (None if one is None else one.numbers for one in (grid, other, out_grid))
    assert first is not None
    added, ends = None if second is None else second.of_codes, None if out is None else out.to_codes
    return sum_codes_of(first.of_codes, added, activation, ends)


def _in_operations(
    a: Tensor,
    grid: Grid,
    b: Tensor | None,
    other: Grid | None,
    activation: str,
    dtype: torch.dtype,
    out: Grid | None,
) -> Tensor:
    added = (b, None, None) if other is None else (b, other.scale, other.zero)
    ends: dict[str, Any] = {}
    if out is not None:
        ends = {"out_scale": out.scale, "out_zero": out.zero, "qmin": out.low, "qmax": out.high}
    return requantize_ref(a, grid.scale, grid.zero, *added, **ends, activation=activation, dtype=dtype)


def is_dense(t: Tensor) -> bool:
    """Says whether t has elements and they fill their memory, in whatever order of axes."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return t.numel() > 0
    step = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return t.numel() > 0
