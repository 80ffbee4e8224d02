"""Sums what the solvers need of a layer's input over all tokens: second moments, drift, extremes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gs_kernels import gram_

T = TypeVar("T")
SHOWN = 4  # columns that a message names


class InputStatistics:
    """Keeps sums over tokens, in fp32, of one tensor `^X [T, K]` that the layers of a stage read.

    gram: `^X^T ^X`, `[groups, K, K]`. cross: `(~X - ^X)^T ^X`, of the same shape, if `~X`, the same input in the float
    network, is to be compared. absmax: `[groups, K]`, largest |x| of each column. count: tokens. lent: those that the
    second moments hold beside them, see `lend`.

    Args:
        columns: K.
        groups: of a grouped convolution, whose groups read columns of their own; 1 otherwise.
        cross: whether `update` gets the float input too.
        device: where the sums are.
    """

    def __init__(
        self, columns: int, groups: int = 1, cross: bool = False, device: torch.device | str | None = None
    ) -> None:
        square = (groups, columns, columns)
        self.gram = torch.zeros(square, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.gram) if cross else None
        self.count, self.lent = 0, 0
        self.absmax = torch.zeros(square[:2], dtype=torch.float32, device=device)
        self._sums = torch.zeros((2, *square[:2]), dtype=torch.float32, device=device)  # of x and of |x|
        self._derived: dict[Hashable, Any] = {}

    @property
    def groups(self) -> int:
        return self.gram.shape[0]

    @property
    def columns(self) -> int:
        return self.gram.shape[2]

    @property
    def weight(self) -> int:
        """Returns how many tokens the second moments stand for."""
        return self.count + self.lent

    @property
    def mean(self) -> Tensor:
        """Returns the mean of each column, `[groups, K]`; 0 without a token."""
        return self._sums[0] / max(1, self.count)

    @property
    def absmean(self) -> Tensor:
        """Returns the mean |x| of each column, `[groups, K]`; 0 without a token."""
        return self._sums[1] / max(1, self.count)

    @torch.no_grad()
    def update(self, quantized: Tensor, floats: Tensor | None = None) -> None:
        """Adds tokens: all rows count.

        Args:
            quantized: `[T, K]` or `[groups, T, K]`, the input as quantized layers before this one make it.
            floats: the same in the float network; needed if there is a cross term, and only then.

        Raises:
            ValueError: if a shape is another, or floats are missing or too many.
        """
        if (floats is None) != (self.cross is None):
            must, got = ("no ", "some") if self.cross is None else ("", "none")
            raise ValueError(f"InputStatistics: update must get {must}floats with cross={not must}, got {got}")
        rows = self._rows(quantized)
        if floats is not None and floats.shape != quantized.shape:
            shapes = f"{list(quantized.shape)} and {list(floats.shape)}"
            raise ValueError(f"InputStatistics: quantized and floats must have one shape, got {shapes}")
        if rows.shape[1] == 0:
            return
        self._derived.clear()
        gram_(self.gram, rows)
        if self.cross is not None and floats is not None:
            gram_(self.cross, rows, self._rows(floats))
        sizes = rows.abs()
        self._sums += torch.stack([t.sum(1, dtype=torch.float32) for t in (rows, sizes)])
        torch.maximum(self.absmax, sizes.amax(1), out=self.absmax)
        self.count += rows.shape[1]

    def _rows(self, x: Tensor) -> Tensor:
        """Returns `[groups, T, K]`: fp32 on a CPU, what has 16 bits as it is on a GPU."""
        expected = (2, 3) if self.groups == 1 else (3,)
        rows = x.unsqueeze(0) if x.dim() == 2 else x
        if x.dim() not in expected or rows.shape[0] != self.groups or rows.shape[2] != self.columns:
            must = f"[T, {self.columns}]" if self.groups == 1 else f"[{self.groups}, T, {self.columns}]"
            raise ValueError(f"InputStatistics: rows must be {must}, got {list(x.shape)}")
        wide = self.gram.is_cpu or rows.dtype.itemsize > 2
        return rows.detach().to(self.gram.device, torch.float32 if wide else rows.dtype)

    @torch.no_grad()
    def all_reduce(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Sums over all processes of the group, each of which must call it; extremes take their maximum."""
        self._derived.clear()
        count = torch.tensor([self.count], device=self.gram.device)
        for t in (self.gram, self.cross, self._sums, count):
            if t is not None:
                dist.all_reduce(t, group=process_group)
        dist.all_reduce(self.absmax, dist.ReduceOp.MAX, group=process_group)
        self.count = int(count)

    def lend(self, others: InputStatistics, tokens: int) -> None:
        """Adds the mean second moments of other tokens, as so many; drift, means and extremes stay those of its own."""
        if others.count:
            self._derived.clear()
            self.gram += others.gram * (tokens / others.count)
            self.lent += tokens

    def check(self, who: str) -> None:
        """Raises unless all sums are finite.

        Raises:
            ValueError: with the layer's name, and the columns that are not.
        """
        finite = self.gram.diagonal(dim1=1, dim2=2).isfinite()  # which bounds the rest
        if self.cross is not None and bool(finite.all()):
            finite = self.cross.isfinite().all(2)
        if not bool(finite.all()):
            bad = (~finite.flatten()).nonzero().flatten().tolist()
            names = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
            raise ValueError(
                f"{who}: the inputs of calibration must be finite, got NaN or Inf, or sums above the range of fp32, in "
                f"{len(bad)} of {finite.numel()} columns ({names}); run the float network on the data and look there"
            )

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` derives from the sums, computed once for all layers of the stage."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
