"""From int8 codes to the sum of what they stand for, or its codes on another grid, in one pass over memory.

Floats pass through exactly what they pass through as floats: each code is `(code - zero) * scale` in the dtype of the
network, then they are added, activated and quantized. Compiled for a CPU in fp32; elsewhere operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.compiled import call, compiled
from gs_kernels.dispatch import is_eager
from gs_kernels.qconv2d.cpu_native import sum_codes


@dataclass(frozen=True)
class Numbers:
    """A grid as C++ takes it.

    Args:
        of_codes: scale and zero point of int8 codes.
        to_codes: inverse of the scale, rest and whole part of that zero point, the smallest and largest code.
        of_floats: the same of the codes that `quantize` gives, which those of an unsigned grid are `moved` against.
    """

    of_codes: tuple[float, float]
    to_codes: tuple[float, float, float, float, float]
    of_floats: tuple[float, float, float, float, float]
    moved: int


# of a StaticQuantizer, `[1]` fp32 each but the last two: scale, zero point of int8 codes, what `quantize` adds and
# multiplies (inverse of the scale, whole and rest of the zero point), the smallest and largest code; all that on a CPU
Grid: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int], Numbers | None]
Operand: TypeAlias = tuple[Tensor, Grid]
COMPILE_FROM = 1 << 11  # elements


def from_codes(a: Operand, b: Operand | None, activation: str, dtype: torch.dtype, grid: Grid | None) -> Tensor:
    """`act(a + b)`, of the strides of a: dtype, or int8 codes on a grid.

    Args:
        a, b: int8 codes of one shape, and their grids; without b, the values of a alone.
        activation: as `ACTIVATIONS` names it.
    """
    codes, about = a
    y = _at_once(a, b, activation, dtype, grid)
    if y is not None:
        return y
    other = None if b is None else b[0]
    dense = _order(codes)
    if other is not None and (dense is None or other.stride() != codes.stride()):
        other, dense = torch.empty_like(codes).copy_(other), _order(codes)
    args: tuple[Any, ...] = (codes, *about[:2], other, *((None, None) if b is None else b[1][:2]), activation, dtype)
    args += (None, None, None, 0, 0) if grid is None else (*grid[2:5], *grid[5])
    run: Any = sum_chain
    if dense is not None and dtype == torch.float32 and codes.device.type == "cpu" and is_eager(codes):
        flat = tuple(t.as_strided(dense, (1,)) if i in (0, 3) and t is not None else t for i, t in enumerate(args))
        if codes.numel() >= COMPILE_FROM:
            kinds = tuple(t.dtype if isinstance(t, Tensor) else t for t in flat)
            run = compiled(sum_chain, kinds, lambda: _example(kinds))
        return call(run, *flat).as_strided(codes.shape, codes.stride())  # type: ignore[no-any-return]
    return call(run, *args)  # type: ignore[no-any-return]


def _at_once(a: Operand, b: Operand | None, activation: str, dtype: torch.dtype, grid: Grid | None) -> Tensor | None:
    """In C++; None where that does not run, or some tensor is another than it takes."""
    codes = a[0]
    dense = codes.is_contiguous() or (codes.dim() == 4 and codes.is_contiguous(memory_format=torch.channels_last))
    if not dense or dtype != torch.float32 or codes.numel() == 0 or not codes.is_cpu or not is_eager(codes):
        return None
    grids = [part[1][6] for part in (a, b) if part is not None]
    into = None if grid is None else grid[6]
    if None in grids or (grid is not None and into is None):
        return None
    if b is None:
        other = None
    else:
        assert grids[1] is not None
        other = (b[0] if b[0].stride() == codes.stride() else torch.empty_like(codes).copy_(b[0]), *grids[1].of_codes)
    assert grids[0] is not None
    return sum_codes((codes, *grids[0].of_codes), other, activation, None if into is None else into.to_codes)


def sum_chain(
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
    rest: Tensor | None,
    low: int,
    high: int,
) -> Tensor:
    y = ((a.float() - a_zero) * a_scale).to(dtype)
    if b is not None and b_scale is not None and b_zero is not None:
        y = y + ((b.float() - b_zero) * b_scale).to(dtype)
    y = ACTIVATIONS[activation].function(y)
    if inverse is None or whole is None or rest is None:
        return y
    level = torch.round(y.float() * inverse + rest) + whole
    return level.clamp(low, high).to(torch.int8)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order of axes."""
    return _order(t) is not None


def _order(codes: Tensor) -> tuple[int] | None:
    """`(elements,)` if they fill their memory, in whatever order of axes; else None."""
    axes = sorted(zip(codes.stride(), codes.shape, strict=True))
    step = 1
    for stride, size in axes:
        if size != 1:
            if stride != step:
                return None
            step *= size
    return (step,) if codes.numel() else None


def _example(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    sizes = {0: 10007, 3: 10007}
    places = [i for i, kind in enumerate(kinds) if i not in (6, 7) and isinstance(kind, torch.dtype)]
    return tuple(torch.ones(sizes.get(i, 1), dtype=k) if i in places else k for i, k in enumerate(kinds))
