"""Declares the tiles of kernels that go over rows of elements once: fake-quant and its gradient, codes, ranges."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.strided_rows import BY_COL, BY_CYCLE, BY_ROW, BY_TENSOR
from gs_kernels.fake_quant.tiles import default_tile
from gs_kernels.tuning.space import Machine, Problem, Space, Tile

DTYPE = torch.bfloat16  # of the tensor that is timed: tiles serve all dtypes
COLS = 4096  # of it
# by where scales are: sizes of a tensor of n elements, and the axis that owns them
SHAPES: dict[int, tuple[tuple[int, ...], int]] = {
    BY_TENSOR: ((-1, COLS), -1),
    BY_ROW: ((-1, COLS), 0),
    BY_COL: ((-1, COLS), 1),
    BY_CYCLE: ((-1, 64, 196), 1),
}
CHOICES: dict[str, tuple[Any, ...]] = {"elements": (1024, 2048, 4096, 8192, 16384), "warps": (2, 4, 8, 16)}


def _make(problem: Problem, device: str) -> tuple[Any, ...]:
    """Makes x, dy, one scale per channel, zero, and the axis."""
    sizes, axis = SHAPES[problem["by"]]
    rest = sizes[1] * (sizes[2] if len(sizes) == 3 else 1)
    shape = (max(1, problem["n"] // rest), *sizes[1:])
    x = torch.empty(shape, dtype=DTYPE, device=device)
    if device != "meta":
        x.normal_(generator=torch.Generator(device).manual_seed(0))
    scale = torch.full((shape[axis] if axis >= 0 else 1,), 0.25, device=device)
    return x, torch.ones_like(x), scale, torch.zeros_like(scale), axis


def _run(problem: Problem, operands: Any, machine: Machine) -> tuple[Tensor, ...]:
    """Runs what a training step with learned scales does: the range, the values, the gradients."""
    kernel = importlib.import_module("gs_kernels.fake_quant.kernel")
    ranges = importlib.import_module("gs_kernels.observe.kernel")
    x, dy, scale, zero, axis = operands
    grid = (scale, zero, -8, 7, axis, 0)
    y = kernel.fake_quant_triton(x, *grid)
    return (y, *ranges.minmax_triton(x, axis, 0), *kernel.fake_quant_backward_triton(dy, x, *grid, True, False))


def _refuses(problem: Problem) -> str:
    return "" if problem["by"] in SHAPES and problem["n"] >= 1 else "n must be >= 1, by 0, 1, 2 or 3"


def _candidates(problem: Problem) -> Iterator[Tile]:
    for elements, warps in itertools.product(*CHOICES.values()):
        if 8 <= elements // (32 * warps) <= 64:
            yield {"elements": elements, "warps": warps}


def _default(problem: Problem, machine: Machine) -> Tile:
    return dict(zip(CHOICES, default_tile(problem["by"]), strict=True))


def _describe(tile: Tile) -> str:
    return f"{tile['elements']} elements, {tile['warps']} warps"


SPACES = (
    Space(
        op="fake_quant",
        kernels=("_fake_quant_fwd_kernel", "_fake_quant_bwd_kernel", "_dequantize_kernel", "_minmax_kernel"),
        sizes=("by", "n"),
        rows="n",
        near=(),
        choices=CHOICES,
        refuses=_refuses,
        candidates=_candidates,
        default=_default,
        reference=_default,
        make=_make,
        run=_run,
        describe=_describe,
    ),
)
