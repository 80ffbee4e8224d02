"""Declares the tiles of SLB's kernels: those that mix levels, and those that step."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gs_kernels.slb.tiles import default_threads
from gs_kernels.tuning.space import Machine, Problem, Space, Tile

ROWS = 512  # of the weight that is timed
CHOICES: dict[str, tuple[Any, ...]] = {"vectors": (1, 2, 4), "warps": (1, 2, 4, 8)}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def _make(problem: Problem, device: str) -> tuple[Tensor, ...]:
    """Makes logits, dw, levels, temperature, a scale per row, a momentum, and zeros for dw and the moments."""
    planes, dtype = problem["planes"], DTYPES[problem["itemsize"]]
    o = min(ROWS, problem["n"])
    k = max(1, problem["n"] // o)

    def normal(*sizes: int) -> Tensor:
        t = torch.empty(sizes, device=device)
        return t if device == "meta" else t.normal_(generator=torch.Generator(device).manual_seed(0))

    levels = torch.linspace(-1, 1, max(2, planes)).to(device)
    logits = normal(o, planes, k)
    zeros = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits), torch.zeros_like(logits)
    one, scale = torch.ones(1, device=device), torch.ones(o, device=device)
    return logits.to(dtype), normal(o, k), levels, one, scale, logits, *zeros


def _mix(problem: Problem, operands: Any, machine: Machine) -> tuple[Tensor, ...]:
    """Computes the weight and its gradients."""
    kernel = importlib.import_module("gs_kernels.slb.kernel")
    logits, dw, levels, one, scale, *_ = operands
    shape = [logits.shape[0], logits.shape[2]]
    w = kernel.slb_weight_triton(logits, levels, one, scale, shape, False, False, logits.dtype)
    return w, *kernel.slb_weight_backward_triton(dw, logits, levels, one, scale, False, True, True)


def _update(problem: Problem, operands: Any, machine: Machine) -> tuple[Tensor, ...]:
    """Steps that change nothing, so that each gives what the one before gave."""
    kernel = importlib.import_module("gs_kernels.slb.kernel")
    logits, _, levels, one, scale, momentum, dw, first, second = operands
    kernel.slb_sgd__triton(logits, dw, levels, one, momentum, scale, None, None, 0.0, 1.0, 0.0, False)
    kernel.slb_adamw__triton(logits, dw, levels, one, first, second, one, scale, None, None, 0.0, 0.9, 0.9, 1.0, 0.0)
    return logits, momentum, first, second


def _refuses(problem: Problem) -> str:
    fits = problem["itemsize"] in DTYPES and min(problem["n"], problem["planes"]) >= 1
    return "" if fits else "n and planes must be >= 1, itemsize 2 or 4"


def _candidates(problem: Problem) -> Iterator[Tile]:
    return (dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values()))


def _default(vectors_max: int, problem: Problem, machine: Machine) -> Tile:
    return dict(zip(CHOICES, default_threads(problem["planes"], vectors_max), strict=True))


def _describe(tile: Tile) -> str:
    return f"{tile['vectors']} 16-byte accesses of a thread to each plane, {tile['warps']} warps"


def _space(op: str, vectors_max: int, run: Any, *kernels: str) -> Space:
    default = partial(_default, vectors_max)
    return Space(
        op=op,
        kernels=kernels,
        sizes=("planes", "itemsize", "n"),
        rows="n",
        near=("planes",),
        choices=CHOICES,
        refuses=_refuses,
        candidates=_candidates,
        default=default,
        reference=default,
        make=_make,
        run=run,
        describe=_describe,
    )


SPACES = (
    _space("slb", 2, _mix, "_slb_weight_kernel", "_slb_weight_bwd_kernel", "_slb_pack_kernel"),
    _space("slb_update", 1, _update, "_slb_adamw_kernel", "_slb_sgd_kernel"),
)
