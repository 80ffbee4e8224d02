"""Checks the arguments of convolutions with a packed weight. Looks at metadata only."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.checks import FLOATS, check_packed, check_tensor, dtype_name
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.qconv2d.geometry import ConvGeometry

LARGEST_GROUP = 1 << 14  # of products of 255 and 255 in half steps, the sum is below 2**31


def check_operands(
    who: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    weight: PackedWeight,
    bias: Tensor | None,
    activation: str,
    geometry: ConvGeometry,
) -> tuple[int, ...]:
    """Raises unless x, weight, bias, activation and geometry fit together; returns the shape of y, (B, O, P, Q)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        names = " / ".join(map(dtype_name, dtypes))
        raise TypeError(f"{who}: x must be {names}, got {dtype_name(x.dtype)}; cast x first")
    check_packed(who, weight)
    if x.dim() != 4:
        raise ValueError(f"{who}: x must be [B, C, H, W], got {list(x.shape)}; add axes of size 1")
    b, c, h, w = x.shape
    o, k = weight.shape
    groups = geometry.groups
    if c % groups != 0 or o % groups != 0:
        raise ValueError(f"{who}: groups must divide the channels of x and y, got groups={groups}, C={c}, O={o}")
    if geometry.taps * (c // groups) != k:
        raise ValueError(
            f"{who}: K of the weight [{o}, {k}] must be kernel height * width * C / groups ="
            f" {geometry.r} * {geometry.s} * {c // groups}, got K={k}; check kernel_size, groups and the channels of x"
        )
    p, q = geometry.output(h, w)
    if p < 1 or q < 1:
        raise ValueError(
            f"{who}: x with its padding must be at least as large as the dilated kernel, got {h} x {w},"
            f" padding {geometry.sides}, kernel {geometry.r} x {geometry.s}, dilation {geometry.dilation}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if bias is not None:
        check_tensor(who, "bias", bias, FLOATS, (o,))
    check_devices(who, x, {"weight": weight.codes, "bias": bias})
    return b, o, p, q


def check_devices(who: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{who}: {name} must be on the device of x, {x.device}, got {t.device}; move it there")


def check_int8(
    who: str,
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    tensors: dict[str, Tensor | None],
) -> None:
    """Raises unless what the integer op takes beside `check_operands` is right. tensors: its other tensors, by name."""
    residual = tensors["residual"]
    if weight.levels is not None:
        raise ValueError(f"{who}: weight must have an evenly spaced grid, got levels; use qconv2d")
    if weight.group_size > LARGEST_GROUP:
        raise ValueError(f"{who}: group_size must be at most {LARGEST_GROUP}, got {weight.group_size}; use groups")
    if dtype not in FLOATS:
        raise TypeError(f"{who}: dtype must be float32 / float16 / bfloat16, got {dtype}; out_scale gives int8")
    check_tensor(who, "x_scale", x_scale, (torch.float32,), (1,))
    for name in ("x_zero", "residual_scale", "residual_zero", "out_scale", "out_zero"):
        t = tensors[name]
        if t is not None:
            check_tensor(who, name, t, (torch.float32,), (1,))
    code_sums = tensors["code_sums"]
    if code_sums is not None:
        check_tensor(who, "code_sums", code_sums, (torch.int32,), tuple(weight.scale.shape))
    if residual is not None:
        check_tensor(who, "residual", residual, (*FLOATS, torch.int8), shape)
    if (residual is not None and residual.dtype == torch.int8) != (tensors["residual_scale"] is not None):
        raise ValueError(
            f"{who}: an int8 residual and residual_scale must be given together, got residual"
            f" {None if residual is None else dtype_name(residual.dtype)} and"
            f" {'a' if tensors['residual_scale'] is not None else 'no'} residual_scale"
        )
    for zero, scale in (("residual_zero", "residual_scale"), ("out_zero", "out_scale")):
        if tensors[zero] is not None and tensors[scale] is None:
            raise ValueError(f"{who}: {zero} needs {scale}, got None; give both")
    check_devices(who, x, {"x_scale": x_scale, **tensors})
