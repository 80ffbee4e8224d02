"""Protects buffers from casts: codes, scales and zero points are data, whatever dtype a model computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import Self


class FixedDtypeBuffers(nn.Module):
    """Keeps the dtype of the buffers named in `fixed_dtype` under `.to(dtype)`, `.half()` and the like."""

    fixed_dtype: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        aside = {name: self._buffers[name] for name in self.fixed_dtype}
        self._buffers.update(dict.fromkeys(self.fixed_dtype))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, tensor in aside.items():
                aside[name] = None if tensor is None else _moved(tensor, fn)
        finally:
            self._buffers.update(aside)
        return self


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
