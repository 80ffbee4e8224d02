"""Computes L1 products of floats and their gradient on the CPU by `float.cpp`, or by tensor operations without it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.adder.geometry import forward_axis, gradient_axis
from gs_kernels.adder.unfolded import l1_products, l1_products_dx
from gs_kernels.cpu.library import load_functions
from gs_kernels.qconv2d.geometry import ConvGeometry

PARALLEL_FROM = 1 << 16  # differences, from which a second thread pays
POINT = ConvGeometry(1, 1)
BEHIND = 64  # floats that may be read behind the last plane

size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


class _AdderLayout(ctypes.Structure):
    _fields_ = [
        ("x", pointer),
        *((f"stride_x{axis}", size) for axis in "bchw"),
        *((name, pointer) for name in ("planes", "phases")),
        *((name, size) for name in ("batch", "channels", "h", "w", "count", "rows", "columns")),
        *((name, size) for name in ("stride_h", "stride_w", "top", "left")),
    ]


class _AdderProduct(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("planes", "weight", "offsets")),
        *((name, size) for name in ("batch", "stride_planes", "k", "channels", "ends")),
        ("y", pointer),
        *((f"stride_y{axis}", size) for axis in "bchw"),
        *((name, size) for name in ("pitch", "rows", "columns")),
        ("x", pointer),
        *((name, size) for name in ("stride_xb", "stride_xc")),
    ]


FUNCTIONS: dict[str, Sequence[Any]] = {
    "adder_layout": (ctypes.POINTER(_AdderLayout), number),
    "adder_blocks": (*[pointer] * 3, *[size] * 4, number),
    "adder_product": (ctypes.POINTER(_AdderProduct), number),
    "adder_gradient": (ctypes.POINTER(_AdderProduct), number),
}


@cache
def kernels() -> Any:
    """Returns the functions of `float.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("adder", FUNCTIONS, _self_test, (_AdderLayout, _AdderProduct))


def _self_test(functions: Any) -> bool:
    """Compares a small product and its gradient with tensor operations; all numbers are exact."""
    x = (torch.arange(2 * 3 * 9 * 11) * 37 % 64).view(2, 3, 9, 11) / 16 - 2
    w = (torch.arange(9 * 3 * 9) * 29 % 64).view(9, 3, 3, 3) / 16 - 2
    geometry = ConvGeometry(3, 3, 1, 2, top=1, bottom=1, left=1, right=1)
    y = _product(functions, x, w, geometry)
    dx = _gradient(functions, y, x, w, geometry)
    return torch.equal(y, l1_products(x, w, geometry)) and torch.equal(dx, l1_products_dx(y, x, w, geometry))


def _lay(
    functions: Any,
    x: Tensor,
    phases: Sequence[tuple[int, int]],
    rows: int,
    columns: int,
    stride: tuple[int, int],
    before: tuple[int, int],
    threads: int,
) -> Tensor:
    """Copies x `[B, C, H, W]` fp32 into planes of pixels that are side by side; see `AdderLayout` of float.cpp."""
    b, c, h, w = x.shape
    planes = x.new_empty(b * c * len(phases) * rows * columns + BEHIND, dtype=torch.float32)
    table = torch.tensor(phases, device="cpu")
    sizes = b, c, h, w, len(phases), rows, columns, *stride, *before
    layout = _AdderLayout(x.data_ptr(), *x.stride(), planes.data_ptr(), table.data_ptr(), *sizes)
    functions.adder_layout(layout, threads)
    return planes


def _each_channel(channels: int, stride: int, places: Sequence[int]) -> Tensor:
    """Returns where the places of each channel are, one channel after the other."""
    first = torch.arange(channels, device="cpu")[:, None] * stride
    return (first + torch.tensor(places, dtype=torch.int64, device="cpu")).view(-1)


def _blocks(functions: Any, w: Tensor, offsets: Tensor, channels: int, stride: int, width: str, threads: int) -> Tensor:
    """Arranges filters as `adder_blocks` of float.cpp does, as many side by side as the constant of that name says."""
    count = ctypes.c_int64.in_dll(functions, width).value
    blocks = w.new_empty(-(-channels // count), len(offsets), count, dtype=torch.float32)
    sizes = channels, stride, len(offsets), count
    functions.adder_blocks(w.data_ptr(), offsets.data_ptr(), blocks.data_ptr(), *sizes, threads)
    return blocks


def _threads(differences: int) -> int:
    return torch.get_num_threads() if differences >= PARALLEL_FROM else 1


def _product(functions: Any, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Computes `-sum_k |x - w|` of fp32, `[B, O, P, Q]` contiguous."""
    b, c, h, w = x.shape
    o, (p, q) = weight.shape[0], geometry.output(h, w)
    y = x.new_empty(b, o, p, q, dtype=torch.float32)
    if not y.numel():
        return y
    threads = _threads(y.numel() * c * geometry.taps)
    down = forward_axis(geometry.r, geometry.stride_h, geometry.dilation_h, geometry.top, p)
    across = forward_axis(geometry.s, geometry.stride_w, geometry.dilation_w, geometry.left, q)
    phases = [(i, j) for i in down.phases for j in across.phases]
    is_laid_out = not any(geometry.sides) and geometry.stride == (1, 1) and x.stride(3) == 1
    is_laid_out = (
        is_laid_out
        and (h == 1 or x.stride(2) == w)
        and (p - 1) * w + q >= ctypes.c_int64.in_dll(functions, "adder_tile").value
    )
    if is_laid_out:
        planes, pitch, stride_b, stride_c, plane = x, w, x.stride(0), x.stride(1), 0
    else:
        pitch, plane = across.pixels, down.pixels * across.pixels
        stride_c = len(phases) * plane
        stride_b = c * stride_c
        before = (down.before, across.before)
        planes = _lay(functions, x, phases, down.pixels, across.pixels, geometry.stride, before, threads)
    taps = [
        (i * len(across.phases) + j) * plane + row * pitch + column for i, row in down.taps for j, column in across.taps
    ]
    offsets = _each_channel(c, stride_c, taps)
    k = c * geometry.taps
    every = torch.arange(k, device="cpu")
    blocks = _blocks(functions, weight.contiguous(), every, o, k, "adder_outputs", threads)
    pointers = planes.data_ptr(), blocks.data_ptr(), offsets.data_ptr()
    sizes = b, stride_b, len(offsets), o, is_laid_out
    pixels = (p * q, 1, p * q) if pitch == q else (pitch, p, q)
    product = _AdderProduct(*pointers, *sizes, y.data_ptr(), *y.stride(), *pixels, None, 0, 0)
    functions.adder_product(product, threads)
    return y


def _gradient(functions: Any, dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Computes `sum_o clamp(w - x, -1, 1) dy` of fp32, `[B, C, H, W]` contiguous: a product for each phase of x."""
    b, c, h, w = x.shape
    o = dy.shape[1]
    dx = x.new_empty(b, c, h, w, dtype=torch.float32)
    if not dx.numel():
        return dx
    threads = _threads(dy.numel() * c * geometry.taps)
    down, rows, top = gradient_axis(geometry.r, geometry.stride_h, geometry.dilation_h, geometry.top, h)
    across, columns, left = gradient_axis(geometry.s, geometry.stride_w, geometry.dilation_w, geometry.left, w)
    dys = _lay(functions, dy, [(0, 0)], rows, columns, (1, 1), (top, left), threads)
    phases = [(i.phase, j.phase) for i in down for j in across]
    heights = max(i.pixels for i in down)
    xs = _lay(functions, x, phases, heights, columns, geometry.stride, (0, 0), threads)
    plane, filters, taps = heights * columns, weight.contiguous(), geometry.taps
    for place, (i, j) in enumerate((i, j) for i in down for j in across):
        starts = [row * columns + column for row in i.starts for column in j.starts]
        met = [row * geometry.s + column for row in i.taps for column in j.taps]
        offsets = _each_channel(o, rows * columns, starts)
        blocks = _blocks(functions, filters, _each_channel(o, c * taps, met), c, taps, "adder_inputs", threads)
        pointers = dys.data_ptr(), blocks.data_ptr(), offsets.data_ptr()
        y = dx[:, :, i.phase :: geometry.stride_h, j.phase :: geometry.stride_w]
        here = xs[place * plane :]
        stride_c = len(phases) * plane
        product = _AdderProduct(
            *(*pointers, b, o * rows * columns, len(offsets), c, False),
            *(y.data_ptr(), *y.stride(), columns, i.pixels, j.pixels),
            *(here.data_ptr(), c * stride_c, stride_c),
        )
        functions.adder_gradient(product, threads)
    return dx


def adder_conv2d_cpu(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    functions = kernels()
    if functions is None:
        return l1_products(x, weight, geometry).to(x.dtype)
    return _product(functions, x.float(), weight.float(), geometry).to(x.dtype)


def adder_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:
    functions = kernels()
    # |x - w| is |w - x|: rows of the weight as pixels, and rows of y so follow each other
    image, filters = weight.float().mT[None, :, None], x.float()[:, :, None, None]
    y = l1_products(image, filters, POINT) if functions is None else _product(functions, image, filters, POINT)
    return y[0, :, 0].to(x.dtype)


def adder_conv2d_dx_cpu(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    functions = kernels()
    if functions is None:
        return l1_products_dx(dy, x, weight, geometry).to(x.dtype)
    return _gradient(functions, dy.float(), x.float(), weight.float(), geometry).to(x.dtype)
