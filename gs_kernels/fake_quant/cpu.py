"""Computes fake-quant on the CPU in one fused pass over memory, compiled for large tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import inverse
from gs_kernels.fake_quant.strided_rows import BY_COL, BY_ROW, BY_TENSOR, Rows, like, readable, same_layout
from gs_kernels.runtime.inductor import Function, call, compiled
from gs_kernels.runtime.torch_private import is_eager

COMPILE_FROM = 1 << 16  # elements; below, calling eagerly costs less than the wait for a compiler could win back

# the sizes of examples: about 2**20 elements, all different
EXAMPLES: dict[str, tuple[int, ...]] = {
    "tensor": (1048583,),
    "row": (1021, 1031),
    "col": (1031, 1021),
    "mid": (61, 127, 131),
}


def fused_fake_quant(x: Tensor, *grid: Tensor) -> Tensor:
    s, z, inv, zi, zf, lo, hi = grid
    return _steps(x, inv, zi, zf).clamp_(lo, hi).sub_(z).mul_(s).to(x.dtype)


def fused_fake_quant_backward(
    dy: Tensor, x: Tensor, for_scale: bool, for_zero: bool, *grid: Tensor
) -> tuple[Tensor, ...]:
    s, z, inv, zi, zf, lo, hi = grid
    r = _steps(x, inv, zi, zf)
    inside = (r >= lo) & (r <= hi)
    dx = torch.where(inside, dy, 0.0)
    ds = dz = s.new_empty(0)
    if for_scale:
        level = r.clamp_(lo, hi).sub_(z)
        ds = total(torch.where(inside, level - x.float() * inv, level).mul_(dy), s)
    if for_zero:
        dz = total(torch.where(inside, 0.0, -s).mul_(dy), s)
    return dx, ds, dz


def fused_quantize(x: Tensor, dtype: torch.dtype, *grid: Tensor) -> Tensor:
    _, _, inv, zi, zf, lo, hi = grid
    r = _steps(x, inv, zi, zf)
    return torch.where(r.isnan(), lo, r.clamp_(lo, hi)).to(dtype)


def fused_dequantize(codes: Tensor, dtype: torch.dtype, s: Tensor, z: Tensor) -> Tensor:
    return (codes.float() - z).mul_(s).to(dtype)


def _steps(x: Tensor, inv: Tensor, zi: Tensor, zf: Tensor) -> Tensor:
    return (x.float() * inv).add_(zf).round_().add_(zi)


def total(t: Tensor, s: Tensor) -> Tensor:
    """Sums over the elements of each scale: t is `[n]` or `[..., C, cols]`. By column, `[n, C]`, returns t itself."""
    if t.dim() == 1:
        return t.sum().view(1)
    if s.dim() == 1:
        return t  # summed outside: compiled, a sum over rows strides through memory, 20 times slower
    return t.sum(-1) if t.dim() == 2 else t.sum(-1).sum(0)


class DenseView:
    """Views x as a dense tensor of rank 1 to 3 in memory order, and shapes scales to broadcast against it."""

    def __init__(self, x: Tensor, axis: int, group: int) -> None:
        self.given = x
        x, rows = readable(x, axis, group)
        self.dense = x if rows.dense else torch.empty_like(x).copy_(x)
        self.kind, self.shape, self.strides = _kind(rows)
        self.x = self.view(self.dense)

    def view(self, t: Tensor) -> Tensor:
        return t.as_strided(self.shape, self.strides)

    def gradient(self, dy: Tensor) -> Tensor:
        """Views dy in the order of x, after a copy if it is laid out otherwise."""
        return self.view(dy if same_layout(dy, self.dense) else torch.empty_like(self.dense).copy_(dy))

    def scales(self, t: Tensor) -> Tensor:
        return t.view(-1, 1) if self.kind in ("row", "mid") else t

    def grid(self, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, ...]:
        """Returns scale, zero, 1 / scale, whole part and fraction of zero, qmin, qmax, shaped to broadcast."""
        s, z = self.scales(scale), self.scales(zero)
        zi = z.round()
        return s, z, inverse(s, z), zi, z - zi, _level(qmin), _level(qmax)

    def restore(self, t: Tensor) -> Tensor:
        """Returns a result with the shape and strides of x."""
        shape, strides = self.dense.shape, self.dense.stride()
        if is_eager(t):
            # not a view of t: autograd forbids in-place operations, such as a ReLU, on views that an op returns
            y = t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), shape, strides)
        else:
            y = t.as_strided(shape, strides)
        return y if self.dense is self.given else like(y, self.given)

    def run(self, function: Function, *args: Any) -> Any:
        """Calls the function, compiled if x is large."""
        if self.x.numel() < COMPILE_FROM or 1 in self.shape:
            return call(function, *args)
        flags = tuple(a for a in args if not isinstance(a, Tensor))
        return call(compiled(function, (self.kind, self.x.dtype, *flags), lambda: self._example(args)), *args)

    def _example(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape = EXAMPLES[self.kind]
        channels = {"tensor": 1, "row": shape[0], "col": shape[-1], "mid": shape[len(shape) // 2]}[self.kind]

        def enlarged(a: Any) -> Any:
            if not isinstance(a, Tensor) or a.dim() == 0:
                return a
            return torch.zeros(shape, dtype=a.dtype) if a.shape == self.shape else self.scales(torch.ones(channels))

        return tuple(enlarged(a) for a in args)


@lru_cache(maxsize=4096)
def _kind(rows: Rows) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Returns kind, shape and strides of the dense view."""
    if rows.by == BY_TENSOR:
        return "tensor", (rows.rows * rows.cols,), (1,)
    if rows.by == BY_COL:
        return "col", (rows.rows, rows.cols), (rows.cols, 1)
    c, cols = rows.channels, rows.cols
    return (
        ("row", (c, cols), (cols, 1)) if rows.by == BY_ROW else ("mid", (rows.rows // c, c, cols), (c * cols, cols, 1))
    )


@lru_cache(maxsize=256)
def _level(q: int) -> Tensor:
    return torch.tensor(float(q))


def fake_quant_cpu(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    view = DenseView(x, axis, group)
    return view.restore(view.run(fused_fake_quant, view.x, *view.grid(scale, zero, qmin, qmax)))


def fake_quant_backward_cpu(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    for_scale: bool,
    for_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    view = DenseView(x, axis, group)
    grid = view.grid(scale, zero, qmin, qmax)
    dx, ds, dz = view.run(fused_fake_quant_backward, view.gradient(dy), view.x, for_scale, for_zero, *grid)
    if view.kind == "col":
        ds, dz = (t.sum(0) if wanted else t for t, wanted in ((ds, for_scale), (dz, for_zero)))
    return view.restore(dx), ds, dz


def quantize_cpu(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    view = DenseView(x, axis, group)
    dtype = torch.int8 if qmin < 0 else torch.uint8
    return view.restore(view.run(fused_quantize, view.x, dtype, *view.grid(scale, zero, qmin, qmax)))


def dequantize_cpu(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    view = DenseView(codes, axis, group)
    return view.restore(view.run(fused_dequantize, view.x, dtype, view.scales(scale), view.scales(zero)))
