"""Lets the tuner find tiles of products with packed weights: of float x, and of 8-bit x."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.qmatmul.tiles import (
    FEW_ROWS,
    Plan,
    choose_plan,
    default_int8_rule,
    default_rule,
    int8_plan_of,
    plan_of,
    timed_bits,
)
from gs_kernels.tuning.space import Machine, Problem, Space, Tile

GROUP = 128  # elements per scale of the weights that are tuned for; one scale a row where it does not divide K
DTYPE = torch.bfloat16
FP8_SM = 89  # the first compute capability that multiplies 8-bit floats
# programs: how many an SM should have to do, for split-K; 0 never splits
CHOICES: dict[str, tuple[Any, ...]] = {
    "dense": (False, True),
    "scale_parts": (False, True),
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4, 5, 6),
    "programs": (0, 1, 2, 3, 4),
}
INT8_CHOICES = {name: values for name, values in CHOICES.items() if name not in ("dense", "scale_parts")}
DENSE: Tile = {name: True if name == "dense" else values[0] for name, values in CHOICES.items()}


def make_weight(bits: int, n: int, k: int, group: int, dtype: torch.dtype, device: str) -> PackedWeight:
    """Makes a planar weight `[n, k]` with scales of dtype. Any bits are codes.

    Scales are such that a product with a normal x is about normal. On "meta" without memory.
    """
    blocks, groups = (-(-k // 128), n, 8 * bits), -(-k // group)
    zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    if device == "meta":
        codes = torch.empty(blocks, dtype=torch.int16, device=device)
        scale = torch.empty(n, groups, dtype=dtype, device=device)
        return PackedWeight(codes, scale, zero, None, bits, (n, k), group, PLANAR)
    draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    codes = torch.randint(-(1 << 15), 1 << 15, blocks, dtype=torch.int16, **draw)
    scale = torch.rand(n, groups, **draw).add_(1).mul_(2 / (2**bits * k**0.5)).to(dtype)
    return PackedWeight(codes, scale, zero, None, bits, (n, k), group, PLANAR)


def make_normal(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Makes a tensor of normal numbers, for int8 times 32; on "meta" without memory."""
    if device == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    x = torch.randn(size, generator=torch.Generator(device).manual_seed(1), device=device)
    return (x.mul_(32).clamp_(-127, 127) if dtype == torch.int8 else x).to(dtype)


def _make(problem: Problem, device: str) -> tuple[Tensor, PackedWeight]:
    n, k = problem["n"], problem["k"]
    x = make_normal((problem["m"], k), DTYPE, device)
    return x, make_weight(problem["bits"], n, k, _group(k), DTYPE, device)


def _group(k: int) -> int:
    return GROUP if k % GROUP == 0 else k


def _run(problem: Problem, operands: Any, machine: Machine) -> Tensor:
    """Does what the op's launcher does, which keeps plans that it has chosen once."""
    kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
    x, weight = operands
    m, n, k, bits = (problem[name] for name in ("m", "n", "k", "bits"))
    on = {"sm": machine.sm, "sm_count": machine.sm_count}
    plan = choose_plan(m, n, k, bits, x_bits=16, levels=False, symmetric=True, **on)
    if plan.dense:
        y: Tensor = kernel.multiply_dense(x, weight, None, "none")
    else:
        y = kernel.multiply(x, weight, None, "none", plan, torch.version.hip is None)
    return y


def _refuses(problem: Problem) -> str:
    is_valid = min(problem.values()) >= 1 and problem["bits"] in (1, 2, 4, 8)
    return "" if is_valid else "m, n and k must be >= 1, bits 1, 2, 4 or 8"


def tiles_of(choices: dict[str, tuple[Any, ...]], m: int, **fixed: Any) -> Iterator[Tile]:
    """Yields tiles without split-K: blocks of x hold half of the rows or 64, and warps no more sums than registers."""
    rows = max(16, 1 << (m - 1).bit_length())
    names = [name for name in choices if name not in (*fixed, "programs")]
    for values in itertools.product(*(choices[name] for name in names)):
        tile = {**fixed, **dict(zip(names, values, strict=True)), "programs": 0}
        size = tile["block_m"] * tile["block_n"]
        fits = min(rows // 2, 64) <= tile["block_m"] <= rows and size <= 256 * 128
        held = tile["warps"] >= 4 or size <= 64 * 16
        if fits and held and 2 <= tile["stages"] <= 5:
            yield tile


def _candidates(problem: Problem) -> Iterator[Tile]:
    yield DENSE
    for tile in tiles_of(CHOICES, problem["m"], dense=False):
        if not tile["scale_parts"] or tile["block_m"] <= 2 * FEW_ROWS:
            yield tile


def tile_of(plan: Plan, programs: int, names: Any) -> Tile:
    fields = {**asdict(plan), "programs": programs}
    return {name: fields[name] for name in names}


def _default(problem: Problem, machine: Machine) -> Tile:
    m, n, k, bits = (problem[name] for name in ("m", "n", "k", "bits"))
    on = {"sm": machine.sm, "sm_count": machine.sm_count}
    plan = plan_of(default_rule(m, machine.sm), m, n, k, bits, x_bits=16, symmetric=True, **on)
    return DENSE if plan.dense else tile_of(plan, plan.per_sm if plan.shares else 0, CHOICES)


def describe(tile: Tile) -> str:
    if tile.get("dense"):
        return "dequantize, then multiply"
    texts = [f"{tile['block_m']} rows x {tile['block_n']} outputs, {tile['warps']} warps, {tile['stages']} stages"]
    if "scale_parts" in tile:
        texts.append("scales on products" if tile["scale_parts"] else "scales on weights")
    split = f"K split until an SM has {tile['programs']} programs" if tile["programs"] else "K not split"
    return ", ".join([*texts, split])


def _int8_make(problem: Problem, device: str) -> tuple[Any, ...]:
    """Makes 8-bit x with its scale, float x, and a weight."""
    m, n, k, group = (problem[name] for name in ("m", "n", "k", "group"))
    weight = make_weight(timed_bits(whole=not group), n, k, group or k, torch.float32, device)
    x_scale = torch.full((m,), 1 / 32, dtype=torch.float32, device=device)
    return make_normal((m, k), torch.int8, device), x_scale, make_normal((m, k), DTYPE, device), weight


def _int8_run(problem: Problem, operands: Any, machine: Machine) -> tuple[Tensor, ...]:
    """Computes the product of codes and, where a GPU knows 8-bit floats and they hold the weight, that of those."""
    kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
    x8, x_scale, x, weight = operands
    y = kernel.qmatmul_int8_triton(x8, x_scale, weight, None, None, None, "none", DTYPE)
    if machine.sm < FP8_SM or not problem["group"]:
        return (y,)
    return y, kernel.qmatmul_fp8_triton(x, weight, None, "none")


def _int8_refuses(problem: Problem) -> str:
    sizes, group = (problem[name] for name in ("m", "n", "k")), problem["group"]
    if min(sizes) < 1 or (group and (problem["k"] % group or group % 32)):
        return "m, n and k must be >= 1, group 0 for one scale a row, or a multiple of 32 that divides k"
    return ""


def _int8_candidates(problem: Problem) -> Iterator[Tile]:
    # groups that end inside a block take products of their own: registers hold only few rows
    most = 256 if problem["group"] % 128 == 0 else 64
    return tiles_of(INT8_CHOICES, min(problem["m"], most))


def _int8_default(problem: Problem, machine: Machine) -> Tile:
    m, n, k, group = (problem[name] for name in ("m", "n", "k", "group"))
    bits, size = timed_bits(whole=not group), group or k
    rule, on = default_int8_rule(m, k, size, False, machine.sm), {"sm": machine.sm, "sm_count": machine.sm_count}
    plan = int8_plan_of(rule, m, n, k, bits, size, fp8=False, **on)
    return tile_of(plan, plan.per_sm if plan.shares else 0, INT8_CHOICES)


SPACES = (
    Space(
        op="qmatmul",
        kernels=("_qmatmul_kernel",),
        sizes=("m", "n", "k", "bits"),
        rows="m",
        near=("n", "k"),
        choices=CHOICES,
        refuses=_refuses,
        candidates=_candidates,
        default=_default,
        reference=lambda problem, machine: DENSE,
        make=_make,
        run=_run,
        describe=describe,
    ),
    Space(
        op="qmatmul_int8",
        kernels=("_qmatmul_int8_kernel",),
        sizes=("m", "n", "k", "group"),
        rows="m",
        near=("n", "k"),
        choices=INT8_CHOICES,
        refuses=_int8_refuses,
        candidates=_int8_candidates,
        default=_int8_default,
        reference=_int8_default,
        make=_int8_make,
        run=_int8_run,
        describe=describe,
    ),
)
