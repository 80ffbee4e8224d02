"""Adds two int8 tensors, applies an activation and rounds to int8 again: implementations, registration, functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from gs_kernels.fake_quant.strided_rows import like
from gs_kernels.requantize.checks import WHO, check_ends, check_grid, check_operand
from gs_kernels.requantize.cpu import add_codes, is_dense, pass_of, requantize_cpu
from gs_kernels.requantize.grid import Grid
from gs_kernels.requantize.ref import requantize_ref
from gs_kernels.runtime.dispatch import INTERPRET, backend_setting, implementations, takes_cpu
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import PLAIN


def _requantize_ref(
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
    out = {"out_scale": out_scale, "out_zero": out_zero}
    y = requantize_ref(
        a, a_scale, a_zero, b, b_scale, b_zero, **out, qmin=qmin, qmax=qmax, activation=activation, dtype=dtype
    )
    return like(y, a)


REQUANTIZE = implementations("requantize", _requantize_ref, requantize_cpu)


def _requantize_fake(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor | None,
    b_scale: Tensor | None,
    b_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    *_: object,
) -> Tensor:
    return torch.empty_like(a, dtype=dtype if out_scale is None else torch.int8)


_requantize = register(
    "requantize(Tensor a, Tensor a_scale, Tensor a_zero, Tensor? b, Tensor? b_scale, Tensor? b_zero, str activation,"
    " ScalarType dtype, Tensor? out_scale, Tensor? out_zero, int qmin, int qmax) -> Tensor",
    REQUANTIZE,
    _requantize_fake,
)


@lru_cache(maxsize=1024)
def prepared_requantize(
    a: Grid, b: Grid | None, activation: str, dtype: torch.dtype, out_grid: Grid | None
) -> Callable[..., Tensor]:
    """Prepares `requantize` without checks, for layers: their grids hold numbers, so that a CPU reads no tensor.

    Args:
        a, b: grids of the codes that are added; b: None for those of a alone.
        out_grid: the grid of the result; None for its values.

    Returns:
        The function of the codes: int8 of one shape, two or one.
    """
    in_cpp = None if INTERPRET else pass_of(a, b, activation, dtype, out_grid)  # for grids on a CPU alone
    other_grid = (None, None) if b is None else (b.scale, b.zero)
    ends = (None, None, -128, 127) if out_grid is None else (out_grid.scale, out_grid.zero, out_grid.low, out_grid.high)

    def run(codes: Tensor, other: Tensor | None = None) -> Tensor:
        direct = in_cpp is not None and type(codes) in PLAIN and not backend_setting() and is_dense(codes)
        if direct and (other is None or other.stride() == codes.stride()):
            return in_cpp(codes, other)  # type: ignore[misc]
        if takes_cpu(codes):
            added = None if other is None or b is None else (other, b)
            return add_codes((codes, a), added, activation, dtype, out_grid)
        return _requantize(  # type: ignore[no-any-return]
            codes, a.scale, a.zero, other, *other_grid, activation, dtype, *ends
        )

    return run


def requantize(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor | None = None,
    b_scale: Tensor | None = None,
    b_zero: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    qmin: int = -128,
    qmax: int = 127,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Adds the values of two int8 tensors and rounds f of the sum: `clamp(round(f(va + vb) / s) + z, qmin, qmax)`.

    va is `(a - a_zero) * a_scale`, and vb likewise. Both, their sum and f of it are rounded to dtype: they are the
    floats that a network in dtype adds and activates. Codes are rounded as `quantize` does. Without b, a alone is
    activated and rounded to the new grid; without out_scale the result is the float values. No gradient.

    Args:
        a: int8 `[...]`. Where its elements leave gaps in memory, and where b has other strides, there is a copy.
        a_scale: `[1]` fp32, of the grid of a.
        a_zero: `[1]` fp32, of the grid of a.
        b: int8, shape of a; to be added.
        b_scale: `[1]` fp32, of the grid of b.
        b_zero: `[1]` fp32, of the grid of b.
        out_scale: `[1]` fp32, of the grid of the result; together with out_zero or not at all.
        out_zero: `[1]` fp32, of the grid of the result.
        qmin: smallest code of the result, >= -128.
        qmax: largest code of the result, <= 127.
        activation: f: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.
        dtype: fp32 / fp16 / bf16.

    Returns:
        shape and strides of a: int8 with out_scale, else of dtype.

    Raises:
        ValueError, TypeError: if codes, grids, shapes or devices do not fit, or activation or dtype are unknown.

    Source: Jacob et al. 2018, arXiv:1712.05877, appendix A.2 (addition).
    """
    check_operand("a", a, a_scale, a_zero)
    if b is not None:
        check_operand("b", b, b_scale, b_zero)
        if b.shape != a.shape or b.device != a.device:
            raise ValueError(
                f"{WHO}: b must have the shape and device of a, {tuple(a.shape)} on {a.device}, got {tuple(b.shape)} on"
                f" {b.device}; expand or move it"
            )
    elif b_scale is not None or b_zero is not None:
        raise ValueError(f"{WHO}: b_scale and b_zero must come with b, got no b")
    if out_scale is not None or out_zero is not None:
        check_grid("out", a, out_scale, out_zero)
    check_ends(qmin, qmax, activation, dtype)
    grids = (t if t is None else t.detach() for t in (a_scale, a_zero, b_scale, b_zero, out_scale, out_zero))
    a_scale, a_zero, b_scale, b_zero, out_scale, out_zero = grids  # type: ignore[assignment]
    return _requantize(  # type: ignore[no-any-return]
        a, a_scale, a_zero, b, b_scale, b_zero, activation, dtype, out_scale, out_zero, qmin, qmax
    )
