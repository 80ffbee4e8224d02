"""Multiplies rows with Hadamard matrices: implementations, registration, the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.hadamard.cpu import hadamard_cpu, hadamard_quantize_rows_cpu
from gs_kernels.hadamard.matrices import factors, hadamard_block
from gs_kernels.hadamard.ref import hadamard_quantize_rows_ref, hadamard_ref
from gs_kernels.hadamard.tiles import choose_tile
from gs_kernels.pack.checks import FLOATS
from gs_kernels.runtime.dispatch import implementations, triton_refuses
from gs_kernels.runtime.torch_op import register, save, saved
from gs_kernels.runtime.torch_private import is_eager


def _refuses(x: Tensor, signs: Tensor | None, block: int, *_: object) -> list[str]:
    reasons = triton_refuses(x)
    if choose_tile(order := _order(x, block), 1) is None:
        reasons.append(f"needs matrices that a program can hold, got order {order}")
    return reasons


def _order(x: Tensor, block: int) -> int:
    """Returns the order of the blocks; 0 stands for the largest."""
    return block or hadamard_block(int(x.shape[-1]))


def _ref(x: Tensor, signs: Tensor | None, block: int, transposed: bool) -> Tensor:
    return hadamard_ref(x, signs, block=_order(x, block), transposed=transposed)


def _rows_ref(x: Tensor, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    return hadamard_quantize_rows_ref(x, signs, block=_order(x, block))


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _rows_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, signs=inputs.signs, block=inputs.block, transposed=inputs.transposed)


def _gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    signs, block, transposed = saved(ctx)
    return {"x": _run(dy, signs, block, not transposed)}


HADAMARD = implementations("hadamard", _ref, hadamard_cpu, _refuses)
ROWS = implementations("hadamard_quantize_rows", _rows_ref, hadamard_quantize_rows_cpu, _refuses)
_run = register(
    "hadamard(Tensor x, Tensor? signs, int block, bool transposed) -> Tensor", HADAMARD, _fake, _gradient, _setup
)
_quantize = register("hadamard_quantize_rows(Tensor x, Tensor? signs, int block) -> (Tensor, Tensor)", ROWS, _rows_fake)


def hadamard(x: Tensor, signs: Tensor | None = None, *, block: int | None = None, transposed: bool = False) -> Tensor:
    """Rotates each row: `(x * signs) @ H / sqrt(n)`, H with blocks of order n on its diagonal; its inverse, transposed.

    H is `hadamard_matrix(n)`, entries 1 and -1: an orthogonal map, which spreads an outlier over the n columns of its
    block. Takes m + log n sums for each value, not n, for `n = m * 2^k`; in fp32, cast once. The gradient of x is dy
    rotated the other way. A block that holds NaN or Inf becomes NaN or Inf.

    Args:
        x: `[..., K]`, fp32 / fp16 / bf16, any strides.
        signs: `[K]` int8, 1 or -1, e.g. drawn at random; None for ones.
        block: n, an order of a Hadamard matrix that divides K; None for the largest, `hadamard_block(K)`, which is K
            for m * 2^k with m 1, 12, 20, 28, 36, ...
        transposed: gives `x @ H^T / sqrt(n) * signs`, which takes the rotation back.

    Returns:
        `[..., K]`, dtype of x, contiguous.

    Raises:
        TypeError: if a dtype is none of the above.
        ValueError: if x has no columns, signs are not `[K]`, or there is no matrix of order `block`, or it does not
            divide K; or, on a CPU in eager mode, signs are not 1 and -1.

    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; Paley 1933.
    """
    if block is not None and (y := _run.repeat(x, signs, block, transposed)) is not None:
        return y
    return _run(x, signs, _checked("hadamard", x, signs, block), transposed)


def hadamard_quantize_rows(
    x: Tensor, signs: Tensor | None = None, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates each row and rounds it to int8: `quantize_rows(hadamard(x, signs, block=block))`, in one pass over x.

    No gradient. Arguments and errors are those of `hadamard`.

    Returns:
        codes `[..., K]` int8, contiguous; scale `[...]` fp32: 1 for a row of zeros, NaN or Inf if x is.
    """
    if block is not None and (y := _quantize.repeat(x, signs, block)) is not None:
        return y
    return _quantize(x.detach(), signs, _checked("hadamard_quantize_rows", x, signs, block))


def _checked(who: str, x: Tensor, signs: Tensor | None, block: int | None) -> int:
    """Returns the order of the blocks, checked like the other arguments."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{who}: x must be a float32 / float16 / bfloat16 tensor, got {getattr(x, 'dtype', x)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{who}: x must be [..., K] with K >= 1, got {list(x.shape)}")
    k = x.shape[-1]
    if signs is not None:
        if not isinstance(signs, Tensor) or signs.dtype != torch.int8:
            raise TypeError(f"{who}: signs must be an int8 tensor, got {getattr(signs, 'dtype', signs)}")
        if signs.shape != (k,) or signs.device != x.device:
            raise ValueError(
                f"{who}: signs must be [{k}] on {x.device}, as x {list(x.shape)} is, got {list(signs.shape)} on "
                f"{signs.device}"
            )
        if signs.is_cpu and is_eager(signs) and not bool((signs.abs() == 1).all()):
            raise ValueError(f"{who}: signs must be 1 and -1, got other values")
    if torch.compiler.is_compiling():  # which cannot look into caches; the op itself finds the order
        return block or 0
    if block is None:
        return hadamard_block(k)
    if block < 1 or k % block:
        raise ValueError(f"{who}: block must divide K, got K={k}, block={block}; use {hadamard_block(k)}")
    if factors(block) is None:
        raise ValueError(
            f"{who}: block must be m * 2^k with m 1, 12, 20, 28, 36, ..., got {block}; use {hadamard_block(block)}"
        )
    return block
