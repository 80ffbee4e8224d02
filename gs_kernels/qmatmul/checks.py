"""Checks the arguments of matrix products with a packed weight. Looks at metadata only."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.checks import FLOATS, check_packed, check_tensor, dtype_name
from gs_kernels.pack.layouts import PackedWeight


def check_operands(
    who: str, x: Tensor, dtypes: tuple[torch.dtype, ...], weight: PackedWeight, bias: Tensor | None, activation: str
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        names = " / ".join(map(dtype_name, dtypes))
        raise TypeError(f"{who}: x must be {names}, got {dtype_name(x.dtype)}; cast x first")
    check_packed(who, weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{who}: the last axis of x must be K={k} of the weight [{n}, {k}], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if bias is not None:
        check_tensor(who, "bias", bias, FLOATS, (n,))
    for name, t in (("weight", weight.codes), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{who}: {name} must be on the device of x, {x.device}, got {t.device}; move it there")


def check_row_scales(who: str, x: Tensor, x_scale: Tensor, x_zero: Tensor | None) -> None:
    """Raises unless x_scale is one per row of x or one for all, and x_zero is one for all."""
    rows = tuple(x.shape[:-1])
    if not isinstance(x_scale, Tensor) or x_scale.dtype != torch.float32:
        got = dtype_name(x_scale.dtype) if isinstance(x_scale, Tensor) else type(x_scale).__name__
        raise TypeError(f"{who}: x_scale must be a float32 tensor, got {got}")
    if tuple(x_scale.shape) not in (rows, (1,)):
        raise ValueError(
            f"{who}: x_scale must have shape {list(rows)}, one per row of x, or [1], got {list(x_scale.shape)}"
        )
    if x_zero is not None:
        check_tensor(who, "x_zero", x_zero, (torch.float32,), (1,))
    for name, t in (("x_scale", x_scale), ("x_zero", x_zero)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{who}: {name} must be on the device of x, {x.device}, got {t.device}; move it there")


def sums_fit(weight: PackedWeight, shifted: bool) -> bool:
    """Says whether int32 holds twice the sums over a row of a weight with one group; shifted: x has a zero point."""
    zero, last = weight.zero, 2**weight.bits - 1
    farthest = last + 1 if isinstance(zero, Tensor) else max(zero, last - zero)  # of codes and zero points
    return weight.scale.shape[1] == 1 and 2 * weight.shape[1] * farthest * (255 if shifted else 128) < 1 << 31
