"""Compiled products with the lanes of a packed weight, and blocks of it dequantised; see gs_kernels/compiled.py.

Inside: `codes [B, G, S, bits * 16]`, `grid [B, G, 32]` and the steps of x `[M, G, S, 8]`; see cpu_lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.compiled import Chain, compiled
from gs_kernels.qmatmul.cpu_lanes import LANES, STEP, UnsuitableError

ROWS = 4  # of x, that one pass over the codes multiplies; 1 has code of its own
OFFSET = 128  # of 8-bit codes, to fit int8


def dot_chain(codes: Tensor, grid: Tensor, x: Tensor, bits: int, rows: int) -> Tensor:
    """`[rows, B * 16]`: x times the weight, in fp32."""
    fields = [code.float() for code in _fields(codes, bits)]
    scale, zero = _scale(grid).unsqueeze(2), _zero(grid).unsqueeze(2)
    sums = x.sum(-1)
    ys = []
    for m in range(rows):
        steps = _total([fields[j] * x[m, :, :, j, None] for j in range(STEP)])
        # the zero point is taken off each step, where sums are short: nothing large cancels
        ys.append(((steps - sums[m, :, :, None] * zero) * scale).sum((1, 2)).flatten())
    return torch.stack(ys)


def int_dot_chain(codes: Tensor, grid: Tensor, x: Tensor, bits: int, rows: int, one: bool) -> Tensor:
    """`[rows, B * 16]` fp32: int32 x times the weight, summed as integers within each group.

    one: there is one scale a row, so that all is summed before it is scaled.
    """
    fields = _fields(codes, bits)
    axes = (1, 2) if one else (2,)
    about = grid[:, 0] if one else grid
    ys = []
    for m in range(rows):
        steps = _total([fields[j] * x[m, :, :, j, None] for j in range(STEP)])
        sums = steps.sum(axes, dtype=torch.int32)  # [B, 16] or [B, G, 16]
        x_sums = x[m].sum(dtype=torch.int32) if one else x[m].sum((1, 2), dtype=torch.int32).unsqueeze(1)
        y = _real(sums, x_sums, about)
        ys.append((y if one else y.sum(1)).flatten())
    return torch.stack(ys)


def block_chain(codes: Tensor, grid: Tensor, out: Tensor, bits: int) -> None:
    """Fills out `[G, S, 8, B, 16]` with the weight, transposed; int8 is its codes, those of 8 bits 128 lower."""
    scale, zero = (t.transpose(0, 1).unsqueeze(1) for t in (_scale(grid), _zero(grid)))  # [G, 1, B, 16]
    fields = _fields(codes.permute(1, 2, 0, 3), bits)
    if out.dtype == torch.int8:
        planes = [(code - OFFSET if bits == 8 else code).to(out.dtype) for code in fields]
    else:
        planes = [((code.float() - zero) * scale).to(out.dtype) for code in fields]
    out.copy_(torch.stack(planes, 2))


def add_chain(y: Tensor, sums: Tensor, x_sums: Tensor, grid: Tensor, offset: int) -> None:
    """Adds one group to y `[M, B, 16]`: from sums of integer products, sums of x `[M, 1, 1]` and grid `[B, 32]`."""
    y.add_(_real(sums, x_sums, grid, offset))


def _real(sums: Tensor, x_sums: Tensor, grid: Tensor, offset: int = 0) -> Tensor:
    """`(sums - zero * x_sums) * scale`, of codes that were `offset` lower: whole zero points in integers, exactly."""
    whole = _zero(grid).round().clamp(-256, 256)  # more would overflow; the rest goes the way of fractions
    return ((sums - (whole.int() - offset) * x_sums).float() - (_zero(grid) - whole) * x_sums.float()) * _scale(grid)


def _scale(grid: Tensor) -> Tensor:
    return grid[..., :LANES]


def _zero(grid: Tensor) -> Tensor:
    return grid[..., LANES:]


def _fields(codes: Tensor, bits: int) -> list[Tensor]:
    """The 8 codes of each step: int32 `[..., 16]`."""
    fields = []
    for r in range(bits):
        byte = codes[..., r * LANES : (r + 1) * LANES].int()
        for low in range(0, 8, bits):
            above = byte >> low if low else byte
            fields.append(above & (2**bits - 1) if low + bits < 8 else above)
    return fields


def _total(terms: list[Tensor]) -> Tensor:
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


@cache
def _options() -> dict[str, Any]:
    """One loop that keeps its sums in registers, and fused multiply-adds: the compiler's own limits split it."""
    from torch._inductor import list_options  # importing it takes a second

    wanted: dict[str, Any] = {
        "realize_opcount_threshold": 1 << 20,
        "realize_reads_threshold": 1 << 20,
        "realize_acc_reads_threshold": 1 << 20,
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    known = set(list_options())
    return {name: value for name, value in wanted.items() if name in known}


def kernel(chain: Chain, bits: int, *variant: int | bool | torch.dtype) -> Chain:
    """A chain, compiled; variant: rows of x for `dot_chain`, and `one` for `int_dot_chain`; dtype for `block_chain`."""
    return _compiled(chain, (bits, *variant), lambda: _example(chain, bits, *variant))


def add_kernel(bits: int) -> Chain:
    offset = OFFSET if bits == 8 else 0
    return _compiled(add_chain, offset, lambda: _add_example(offset))


def _compiled(chain: Chain, variant: Hashable, example: Callable[[], tuple[Any, ...]]) -> Chain:
    run = compiled(chain, variant, example, _options())
    if run is chain:
        raise UnsuitableError(f"{chain.__name__} is not compiled")  # the log says why
    return run


# large enough to be worth several threads, all sizes different
BLOCKS, GROUPS, STEPS = 131, 7, 19


def _example(chain: Chain, bits: int, variant: Any, *rest: Any) -> tuple[Any, ...]:
    codes = torch.zeros(BLOCKS, GROUPS, STEPS, bits * LANES, dtype=torch.uint8)
    grid = torch.ones(BLOCKS, GROUPS, 2 * LANES)
    if chain is block_chain:
        return codes, grid, torch.empty(GROUPS, STEPS, STEP, BLOCKS, LANES, dtype=variant), bits
    x_dtype = torch.int32 if chain is int_dot_chain else torch.float32
    return codes, grid, torch.ones(variant, GROUPS, STEPS, STEP, dtype=x_dtype), bits, variant, *rest


def _add_example(offset: int) -> tuple[Any, ...]:
    sums = torch.zeros(61, BLOCKS, LANES, dtype=torch.int32)
    grid = torch.ones(BLOCKS, GROUPS, 2 * LANES)[:, 1]  # strides as in a call
    return sums.float(), sums, sums[:, :1, :1].contiguous(), grid, offset
