"""Multiplies with a weight that is turned back to real values first: the whole of it, or if it is large, in slabs.

All slabs have one buffer: what a product takes beside its operands does not grow with the layer. Slabs that stay in the
L2 cache would save the way through memory, and lose more: products of so few columns leave processors idle.
"""

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.qmatmul.kernel.dequantize import BLOCK_K, dequantize, dequantize_slab
from gs_kernels.qmatmul.tiles import DENSE_BYTES

UNIT = 256  # rows of a weight: what tiles of libraries divide


def slabs(size: int, unit: int, nbytes: int) -> list[tuple[int, int]]:
    """Cuts `size` rows, or columns, of `nbytes` in all into parts of whole units, about equal, up to `DENSE_BYTES`."""
    units = -(-size // unit)
    count = min(units, -(-nbytes // DENSE_BYTES))
    return [(units * i // count * unit, min(units * (i + 1) // count * unit, size)) for i in range(count)]


def multiply_dense(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """Multiplies x `[M, K]` as a float layer does: `[M, N]`, columns of one slab of the weight after those of another.

    The bias is added before the one rounding to the dtype of x, the activation is applied after it.
    """
    n, k = weight.shape
    bias = None if bias is None else bias.to(x.dtype)
    parts = slabs(n, UNIT, n * k * x.itemsize)
    if len(parts) == 1:
        y = torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    else:
        y, buffer = x.new_empty(x.shape[0], n), _buffer(parts, k, x)
        for first, end in parts:
            w = dequantize_slab(buffer.narrow(0, 0, (end - first) * k).view(end - first, k), weight, first, 0)
            if bias is None:
                torch.mm(x, w.t(), out=y[:, first:end])
            else:
                torch.addmm(bias[first:end], x, w.t(), out=y[:, first:end])
    return ACTIVATIONS[activation].function(y)


def multiply_dense_dx(dy: Tensor, weight: PackedWeight) -> Tensor:
    """Multiplies dy `[..., N]` with the weight itself: `[..., K]`, in slabs of columns, so that no sum is cut."""
    n, k = weight.shape
    parts = slabs(k, BLOCK_K, n * k * dy.itemsize)
    if len(parts) == 1:
        return dy @ dequantize(weight, dy.dtype)
    rows, buffer = dy.reshape(-1, n), _buffer(parts, n, dy)
    dx = dy.new_empty(rows.shape[0], k)
    for first, end in parts:
        w = dequantize_slab(buffer.narrow(0, 0, n * (end - first)).view(n, end - first), weight, 0, first)
        torch.mm(rows, w, out=dx[:, first:end])
    return dx.view(*dy.shape[:-1], k)


def _buffer(parts: list[tuple[int, int]], other: int, like: Tensor) -> Tensor:
    """Allocates what the largest part of a weight takes. other: its size across the parts."""
    return like.new_empty(max(end - first for first, end in parts) * other)
