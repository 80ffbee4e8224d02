"""Requantizes on a CPU: one pass over memory in C++; where that does not run, a compiled function of operations."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.qconv2d.cpu.direct_int8 import sum_codes
from gs_kernels.requantize.grid import Grid, make_grid
from gs_kernels.runtime.inductor import call, compiled

Operand: TypeAlias = tuple[Tensor, Grid]
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


def add_codes(a: Operand, b: Operand | None, activation: str, dtype: torch.dtype, out_grid: Grid | None) -> Tensor:
    """Computes `requantize` of eager tensors on a CPU, whose grids are known."""
    if a[0].numel() == 0:
        return torch.empty_like(a[0], dtype=dtype if out_grid is None else torch.int8)
    codes, grid = a[0] if is_dense(a[0]) else torch.empty_like(a[0]).copy_(a[0]), a[1]
    other = None if b is None else b[0] if b[0].stride() == codes.stride() else torch.empty_like(codes).copy_(b[0])
    if dtype == torch.float32:
        y = _in_cpp(codes, grid, other, None if b is None else b[1], activation, out_grid)
        if y is not None:
            return y
    scales = (None, None) if b is None else b[1][:2]
    ends = (None, None, None, 0, 0) if out_grid is None else out_grid[2:7]
    row, order = (codes.numel(),), (1,)
    flat: tuple[Any, ...] = (
        *(codes.as_strided(row, order), *grid[:2], None if other is None else other.as_strided(row, order), *scales),
        *(activation, dtype, *ends),
    )
    run: Any = fused_requantize
    if dtype == torch.float32 and codes.numel() >= COMPILE_FROM:
        kinds = tuple(t.dtype if isinstance(t, Tensor) else t for t in flat)
        run = compiled(fused_requantize, kinds, lambda: _example(kinds))
    return call(run, *flat).as_strided(codes.shape, codes.stride())  # type: ignore[no-any-return]


def _in_cpp(
    codes: Tensor, grid: Grid, other: Tensor | None, other_grid: Grid | None, activation: str, out_grid: Grid | None
) -> Tensor | None:
    """Adds dense tensors with equal strides to fp32 values or codes; None where the C++ does not run."""
    if grid.numbers is None or (out_grid is not None and out_grid.numbers is None):
        return None
    added = None
    if other is not None:
        if other_grid is None or other_grid.numbers is None:
            return None
        added = (other, *other_grid.numbers.of_codes)
    ends = None if out_grid is None or out_grid.numbers is None else out_grid.numbers.to_codes
    return sum_codes((codes, *grid.numbers.of_codes), added, activation, ends)


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
