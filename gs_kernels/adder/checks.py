"""Checks the arguments of L1 products. Looks at metadata only."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.checks import FLOATS, check_tensor, dtype_name
from gs_kernels.qconv2d.checks import check_devices
from gs_kernels.qconv2d.geometry import ConvGeometry, Padding, Pair, make_geometry

LARGEST_K = ((1 << 31) - 1) // 255  # differences of codes whose sum an int32 holds


def check_operand(who: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        names = " / ".join(map(dtype_name, dtypes))
        raise TypeError(f"{who}: {name} must be {names}, got {dtype_name(t.dtype)}; cast {name} first")


def check_conv(
    who: str,
    x: Tensor,
    weight: Tensor,
    dtypes: tuple[torch.dtype, ...],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> ConvGeometry:
    """Raises unless an image, filters and geometry fit together; returns the geometry."""
    for name, t in (("x", x), ("weight", weight)):
        check_operand(who, name, t, dtypes)
    if x.dim() != 4:
        raise ValueError(f"{who}: x must be [B, C, H, W], got {list(x.shape)}; add axes of size 1")
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(f"{who}: weight must be [O, C, R, S], each >= 1, got {list(weight.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{who}: weight must have the channels of x, {x.shape[1]}, got {list(weight.shape)}; for groups, call it"
            " for each"
        )
    geometry = make_geometry(who, (int(weight.shape[2]), int(weight.shape[3])), stride, padding, dilation, 1)
    p, q = geometry.output(*x.shape[2:])
    if p < 1 or q < 1:
        raise ValueError(
            f"{who}: x with its padding must be at least as large as the dilated kernel, got"
            f" {x.shape[2]} x {x.shape[3]}, padding {geometry.sides}, kernel {geometry.r} x {geometry.s},"
            f" dilation {geometry.dilation}"
        )
    check_devices(who, x, {"weight": weight})
    return geometry


def check_epilogue(
    who: str,
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    activation: str,
    dtype: torch.dtype,
    tensors: dict[str, Tensor | None],
) -> None:
    """Raises unless what `adder_int8` takes beside image, filters and geometry is right. tensors: by name."""
    o, k = weight.shape[0], weight[0].numel()
    if k > LARGEST_K:
        raise ValueError(f"{who}: K = C * R * S must be at most {LARGEST_K}, got {k}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if dtype not in FLOATS:
        raise TypeError(f"{who}: dtype must be float32 / float16 / bfloat16, got {dtype}; out_scale gives int8")
    scale, bias, residual = tensors["scale"], tensors["bias"], tensors["residual"]
    if scale is None:
        given = [name for name, t in tensors.items() if t is not None and name != "zero"]
        given += [] if activation == "none" else ["activation"]
        if given:
            raise ValueError(f"{who}: {', '.join(given)} must come with scale, got None; without it y is int32 sums")
    else:
        count = 1 if isinstance(scale, Tensor) and scale.numel() == 1 else o
        check_tensor(who, "scale", scale, (torch.float32,), (count,))
    if bias is not None:
        check_tensor(who, "bias", bias, FLOATS, (o,))
    for name in ("zero", "residual_scale", "residual_zero", "out_scale", "out_zero"):
        t = tensors[name]
        if t is not None:
            check_tensor(who, name, t, (torch.float32,), (1,))
    if residual is not None:
        shape = (x.shape[0], o, *geometry.output(*x.shape[2:]))
        check_tensor(who, "residual", residual, (*FLOATS, torch.int8), shape)
    if (residual is not None and residual.dtype == torch.int8) != (tensors["residual_scale"] is not None):
        raise ValueError(
            f"{who}: an int8 residual and residual_scale must be given together, got residual"
            f" {None if residual is None else dtype_name(residual.dtype)} and"
            f" {'a' if tensors['residual_scale'] is not None else 'no'} residual_scale"
        )
    for needs, needed in (("residual_zero", "residual_scale"), ("out_zero", "out_scale")):
        if tensors[needs] is not None and tensors[needed] is None:
            raise ValueError(f"{who}: {needs} needs {needed}, got None; give both")
    check_devices(who, x, tensors)
