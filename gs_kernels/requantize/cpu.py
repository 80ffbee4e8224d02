"""Requantizes on a CPU: one pass over memory in C++; where that does not run, a compiled function of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.program.recording import noted
from gs_kernels.requantize.grid import Grid, make_grid
from gs_kernels.requantize.passes import sum_codes_of
from gs_kernels.runtime.inductor import call, compiled

Operand: TypeAlias = tuple[Tensor, Grid]
AddsCodes: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
COMPILE_FROM = 1 << 11  # elements


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
    return noted(lambda x: torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x), x)


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
    scales = (None, None) if other_grid is None else (other_grid.scale, other_grid.zero)
    ends: tuple[Any, ...] = (None, None, None, 0, 0)
    if out_grid is not None:
        ends = out_grid.inverse, out_grid.whole, out_grid.fraction, out_grid.low, out_grid.high
    row, order = (codes.numel(),), (1,)
    flat: tuple[Any, ...] = (
        *(
            codes.as_strided(row, order),
            grid.scale,
            grid.zero,
            None if other is None else other.as_strided(row, order),
            *scales,
        ),
        *(activation, dtype, *ends),
    )
    run: Any = fused_requantize
    if dtype == torch.float32 and codes.numel() >= COMPILE_FROM:
        kinds = tuple(t.dtype if isinstance(t, Tensor) else t for t in flat)
        run = compiled(fused_requantize, kinds, lambda: _example(kinds))
    return call(run, *flat).as_strided(codes.shape, codes.stride())  # type: ignore[no-any-return]


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


def fused_requantize(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor | None,
    b_scale: Tensor | None,
    b_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    inverse: Tensor | None,
    whole: Tensor | None,
    fraction: Tensor | None,
    low: int,
    high: int,
) -> Tensor:
    y = ((a.float() - a_zero) * a_scale).to(dtype)
    if b is not None and b_scale is not None and b_zero is not None:
        y = y + ((b.float() - b_zero) * b_scale).to(dtype)
    y = ACTIVATIONS[activation].function(y)
    if inverse is None or whole is None or fraction is None:
        return y
    level = torch.round(y.float() * inverse + fraction) + whole
    return torch.where(level.isnan(), low, level.clamp(low, high)).to(torch.int8)


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


def _example(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    sizes = {0: 10007, 3: 10007}
    places = [i for i, kind in enumerate(kinds) if i not in (6, 7) and isinstance(kind, torch.dtype)]
    return tuple(torch.ones(sizes.get(i, 1), dtype=k) if i in places else k for i, k in enumerate(kinds))
