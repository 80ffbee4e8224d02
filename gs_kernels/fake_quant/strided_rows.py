"""Describes any tensor as rows of memory, so that one kernel serves every shape, memory format and granularity.

Element i of row r lies at `r // per * outer + r % per * inner + i` in x, and at `r * cols + i` in results, which are
dense. Its scale is number 0 (by tensor), r (by row), i (by column) or `r % channels` (by cycle).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gs_kernels.runtime.torch_private import is_eager

BY_TENSOR, BY_ROW, BY_COL, BY_CYCLE = 0, 1, 2, 3


@dataclass(frozen=True)
class Rows:
    """Describes rows x cols elements: `per` rows lie `inner` apart, blocks of them `outer`; channels counts scales."""

    by: int
    rows: int
    cols: int
    channels: int
    per: int
    outer: int
    inner: int

    @property
    def dense(self) -> bool:
        return self.inner == self.cols and (self.per == self.rows or self.outer == self.per * self.cols)


def rows_of(shape: Sequence[int], strides: Sequence[int], axis: int, group: int) -> Rows | None:
    """Describes a tensor as rows, or returns None if it must be copied first.

    Args:
        shape: of the tensor.
        strides: of the tensor, in elements.
        axis: that owns the scales, -1 for none.
        group: elements per scale along a row of the tensor, 0 for no groups.
    """
    dims = [(n, stride, d == axis) for d, (n, stride) in enumerate(zip(shape, strides, strict=True)) if n != 1]
    if group > 0 and any(a[1] < b[1] for a, b in itertools.pairwise(dims)):
        return None
    blocks = _merge(sorted(dims, key=lambda dim: dim[1], reverse=True))
    if blocks is None:
        return None
    sizes, strides = [b[0] for b in blocks], [b[1] for b in blocks]
    channel = next((k for k, block in enumerate(blocks) if block[2]), -1)
    if channel < 0:
        return _without_axis(sizes, strides, group)
    if channel > 1 or len(blocks) > channel + 2:
        return None
    outside = channel == 1
    if channel == len(blocks) - 1:
        n, stride = (sizes[0], strides[0]) if outside else (1, sizes[-1])
        return Rows(BY_COL, n, sizes[-1], sizes[-1], n, 0, stride)
    c, cols = sizes[channel], sizes[-1]
    if outside:
        return Rows(BY_CYCLE, sizes[0] * c, cols, c, c, strides[0], strides[1])
    return Rows(BY_ROW, c, cols, c, c, 0, strides[0])


def _merge(dims: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]] | None:
    """Merges neighbours (size, stride, is axis), outermost in memory first, but the axis; None if there is no row."""
    blocks: list[tuple[int, int, bool]] = []
    for size, stride, is_axis in dims:
        if blocks and blocks[-1][1] == size * stride and not is_axis and not blocks[-1][2]:
            size *= blocks.pop()[0]
        blocks.append((size, stride, is_axis))
    return blocks if all(b[1] != 0 for b in blocks) and (not blocks or blocks[-1][1] == 1) else None


def _without_axis(sizes: Sequence[int], strides: Sequence[int], group: int) -> Rows | None:
    if len(sizes) > 2:
        return None
    cols = sizes[-1] if sizes else 1
    n, stride = (sizes[0], strides[0]) if len(sizes) == 2 else (1, cols)
    if group == 0:
        return Rows(BY_TENSOR, n, cols, 1, n, 0, stride)
    if cols % group != 0:
        return None
    rows, per = n * cols // group, cols // group
    return Rows(BY_ROW, rows, group, rows, per, stride, group)


_cached_rows_of = lru_cache(maxsize=4096)(rows_of)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Says whether a has the shape and, where they matter, the strides of b."""
    return a.shape == b.shape and all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def readable(x: Tensor, axis: int, group: int) -> tuple[Tensor, Rows]:
    """Returns x with its rows; x is copied to contiguous memory first if it cannot be described by rows."""
    # sizes that are symbols cannot be hashed
    find = _cached_rows_of if is_eager(x) else rows_of
    rows = find(x.shape, x.stride(), axis, group)
    if rows is None:
        x = x.contiguous() if group > 0 else torch.empty_like(x).copy_(x)
        rows = find(x.shape, x.stride(), axis, group)
    assert rows is not None
    return x, rows


def like(y: Tensor, x: Tensor) -> Tensor:
    """Returns y with the strides of `torch.empty_like(x)`, which differ where groups cross the memory order of x."""
    want = torch.empty_like(x, dtype=y.dtype, device="meta").stride()
    return y if y.stride() == want else torch.empty_like(x, dtype=y.dtype).copy_(y)
