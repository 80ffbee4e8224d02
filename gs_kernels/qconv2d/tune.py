"""Lets the tuner find tiles of convolutions with packed weights: of float and of 8-bit images."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.tiles import PROGRAMS, default_plan
from gs_kernels.qmatmul.tune import DTYPE, describe, make_normal, make_weight, tiles_of
from gs_kernels.tuning.space import Machine, Problem, Space, Tile

BITS = {16: 4, 8: 8}  # of the weight that is timed: tiles serve weights of all widths
CHOICES: dict[str, tuple[Any, ...]] = {
    "dense": (False, True),
    "scale_parts": (False, True),
    "block_m": (16, 32, 64, 128),
    "block_n": (64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
    "programs": (0, 1, 2, 3, 4),
}
DENSE: Tile = {name: True if name == "dense" else values[0] for name, values in CHOICES.items()}


def geometry_of(problem: Problem) -> ConvGeometry:
    """Makes a filter of K / channels taps, as square as they allow, with stride 1, that keeps the size of an image."""
    taps = problem["k"] // problem["channels"]
    r = next(n for n in range(math.isqrt(taps), 0, -1) if taps % n == 0)
    s = taps // r
    top, left = (r - 1) // 2, (s - 1) // 2
    return ConvGeometry(r, s, top=top, bottom=r - 1 - top, left=left, right=s - 1 - left, groups=problem["groups"])


def _make(problem: Problem, device: str) -> tuple[Any, ...]:
    """Makes one image with at least m pixels, and a weight with one scale a channel."""
    m, n, k, groups = (problem[name] for name in ("m", "n", "k", "groups"))
    whole = problem["x_bits"] == 8
    h = math.isqrt(m)
    size = (1, problem["channels"] * groups, h, -(-m // h))
    x = make_normal(size, torch.int8 if whole else DTYPE, device).contiguous(memory_format=torch.channels_last)
    return x, make_weight(BITS[problem["x_bits"]], n * groups, k, k, torch.float32 if whole else DTYPE, device)


def _run(problem: Problem, operands: Any, machine: Machine) -> Tensor:
    kernel = importlib.import_module("gs_kernels.qconv2d.kernel")
    (x, weight), geometry = operands, geometry_of(problem)
    if problem["x_bits"] == 16:
        y: Tensor = kernel.qconv2d_triton(x, weight, None, None, geometry, "none", False)
        return y
    one = torch.ones(1, device=x.device)
    y = kernel.qconv2d_int8_triton(x, one, weight, None, geometry, *[None] * 7, "none", DTYPE, False)
    return y


def _refuses(problem: Problem) -> str:
    if min(problem.values()) < 1 or problem["x_bits"] not in BITS or problem["k"] % problem["channels"]:
        return "all must be >= 1, x_bits 16 or 8, and k a multiple of channels"
    return "has a choice of tiles only for channels that are a multiple of 8" if problem["channels"] % 8 else ""


def _candidates(problem: Problem) -> Iterator[Tile]:
    wide = 64 if problem["n"] <= 64 else 128
    if problem["x_bits"] == 16:
        yield DENSE
    for tile in tiles_of(CHOICES, problem["m"], dense=False):
        scaled = not tile["scale_parts"] or (problem["x_bits"] == 16 and tile["block_m"] == 16)
        shared = tile["warps"] == 4 or tile["block_m"] * tile["block_n"] >= 64 * 128
        if tile["block_n"] <= wide and scaled and shared:
            yield tile


def _default(problem: Problem, machine: Machine) -> Tile:
    m, n, groups = (problem[name] for name in ("m", "n", "groups"))
    options = {"channels": problem["channels"], "x_bits": problem["x_bits"], "int8_group": 0}
    plan = default_plan(m, n, groups, sm=machine.sm, sm_count=machine.sm_count, **options)
    fields = {**asdict(plan), "programs": PROGRAMS}
    return {name: fields[name] for name in CHOICES}


def _reference(problem: Problem, machine: Machine) -> Tile:
    return DENSE if problem["x_bits"] == 16 else _default(problem, machine)


SPACES = (
    # what `choose_plan` is told of a convolution: not its width of weights, its strides or its image
    Space(
        op="qconv2d",
        kernels=("_qconv2d_kernel", "_qconv2d_int8_kernel"),
        sizes=("m", "n", "k", "groups", "channels", "x_bits"),
        rows="m",
        near=("n", "k", "channels"),
        choices=CHOICES,
        refuses=_refuses,
        candidates=_candidates,
        default=_default,
        reference=_reference,
        make=_make,
        run=_run,
        describe=describe,
    ),
)
