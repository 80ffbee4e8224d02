"""L1 products of floats, as convolutions and as linear layers: implementations, registration, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from gs_kernels.adder.checks import check_conv, check_operand
from gs_kernels.adder.cpu.float import POINT, adder_conv2d_cpu, adder_conv2d_dx_cpu, adder_linear_cpu
from gs_kernels.adder.unfolded import l1_products, l1_products_dx
from gs_kernels.pack.checks import FLOATS
from gs_kernels.qconv2d.checks import check_devices
from gs_kernels.qconv2d.geometry import GEOMETRY, ConvGeometry, Padding, Pair
from gs_kernels.runtime.device import convolves_in_fp32
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register, save, saved


def as_image(rows: Tensor) -> Tensor:
    """Views rows `[M, K]` as an image of M pixels, `[1, K, 1, M]`."""
    return rows.mT[None, :, None]


def _conv2d_ref(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return l1_products(x, weight, geometry).to(x.dtype)


def _linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    y = l1_products(as_image(weight), x[:, :, None, None], POINT)  # |x - w| is |w - x|, and rows of y so follow
    return y[0, :, 0].to(x.dtype)


def _dx_ref(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return l1_products_dx(dy, x, weight, geometry).to(x.dtype)


def _conv2d_fake(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *geometry.output(*x.shape[2:]))


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _dx_fake(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return x.new_empty(x.shape)


def _dw(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Computes `sum (x - w) dy`: the gradient of a convolution's weight, less w times the sum of dy."""
    dtype = torch.float32 if x.is_cpu else torch.promote_types(x.dtype, dy.dtype)
    image, padding = x.to(dtype), (geometry.top, geometry.left)
    if not geometry.is_symmetric:
        image, padding = pad(image, geometry.sides), (0, 0)
    with convolves_in_fp32(image):
        dw = conv2d_weight(image, weight.shape, dy.to(dtype), geometry.stride, padding, geometry.dilation)  # type: ignore[arg-type]
    sums = dy.sum((0, 2, 3), dtype=torch.float32)
    return (dw.float() - weight.float() * sums[:, None, None, None]).to(weight.dtype)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, **inputs._asdict())


def _conv2d_gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    x, weight, geometry = saved(ctx)
    return {
        "x": _run_dx(dy, x, weight, geometry) if "x" in wanted else None,
        "weight": _dw(dy, x, weight, geometry) if "weight" in wanted else None,
    }


def _linear_gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    x, weight = saved(ctx)
    image, filters, dys = as_image(x), weight[:, :, None, None], as_image(dy)
    return {
        "x": _run_dx(dys, image, filters, POINT)[0, :, 0].mT.contiguous() if "x" in wanted else None,
        "weight": _dw(dys, image, filters, POINT)[:, :, 0, 0] if "weight" in wanted else None,
    }


def _no_second_gradient(ctx: Any, wanted: set[str], *grads: Tensor) -> dict[str, Tensor | None]:
    raise RuntimeError("adder_conv2d: its gradient has no gradient of its own; call backward without create_graph=True")


ADDER_CONV2D = implementations("adder_conv2d", _conv2d_ref, adder_conv2d_cpu)
ADDER_LINEAR = implementations("adder_linear", _linear_ref, adder_linear_cpu)
DX = implementations("adder_conv2d_dx", _dx_ref, adder_conv2d_dx_cpu)
_run = register(
    "adder_conv2d(Tensor x, Tensor weight, ConvGeometry geometry) -> Tensor",
    ADDER_CONV2D,
    _conv2d_fake,
    _conv2d_gradient,
    _setup_context,
    carried=(GEOMETRY,),
)
_run_linear = register(
    "adder_linear(Tensor x, Tensor weight) -> Tensor", ADDER_LINEAR, _linear_fake, _linear_gradient, _setup_context
)
_run_dx = register(
    "adder_conv2d_dx(Tensor dy, Tensor x, Tensor weight, ConvGeometry geometry) -> Tensor",
    DX,
    _dx_fake,
    _no_second_gradient,
    carried=(GEOMETRY,),
)


def adder_conv2d(x: Tensor, weight: Tensor, stride: Pair = 1, padding: Padding = 0, dilation: Pair = 1) -> Tensor:
    """Compares images with filters: `y[o, p, q] = -sum_crs |x[c, h, w] - weight[o, c, r, s]|`, zeros of padding too.

    Differences and sums are fp32. Gradients are those of adder networks, not of the formula, which are signs:
    `dweight = sum (x - w) dy` and `dx = sum clamp(w - x, -1, 1) dy`. The backward pass keeps x and weight alone.

    Args:
        x: `[B, C, H, W]`, fp32 / fp16 / bf16, any strides; contiguous is read fastest. B may be 0.
        weight: `[O, C, R, S]`, fp32 / fp16 / bf16. There are no groups.
        stride: of H and W, or one number for both, as all pairs.
        padding: pair, of zeros, or `same` for stride 1. Other modes: `torch.nn.functional.pad` x beforehand.
        dilation: pair.

    Returns:
        `[B, O, P, Q]`, dtype of x, contiguous. The gradient of x is contiguous too.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or an argument is none of the above.

    Source: Chen et al. 2020, arXiv:1912.13200, section 3. Differs from the paper: rates by layer (equation 13) are a
    matter of the optimizer.
    """
    geometry = check_conv("adder_conv2d", x, weight, FLOATS, stride, padding, dilation)
    return _run(x, weight, geometry)  # type: ignore[no-any-return]


def adder_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compares rows with rows: `y[m, n] = -sum_k |x[m, k] - weight[n, k]|`. Sums and gradients as in `adder_conv2d`.

    Args:
        x: `[..., K]`, fp32 / fp16 / bf16. Leading axes that are not evenly spaced rows are copied.
        weight: `[N, K]`, fp32 / fp16 / bf16.

    Returns:
        `[..., N]`, dtype of x.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together.
    """
    who = "adder_linear"
    for name, t in (("x", x), ("weight", weight)):
        check_operand(who, name, t, FLOATS)
    if weight.dim() != 2 or min(weight.shape) < 1:
        raise ValueError(f"{who}: weight must be [N, K], each >= 1, got {list(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{who}: x must be [..., {weight.shape[1]}], as weight is, got {list(x.shape)}")
    check_devices(who, x, {"weight": weight})
    y = _run_linear(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
