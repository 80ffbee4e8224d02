"""Notes which C++ kernels one thread calls, with what they read and write, while somebody records.

Between them layers put the operations that they computed otherwise, or say why what they do cannot be repeated.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

# which kernel a call is of, as cpu.cpp has them
CONVOLVE, DEPTHWISE, QUANTIZE, ADD, CHANNELS_LAST, COMPARE = range(6)


class KernelCall(NamedTuple):
    """Describes a call of a kernel.

    Args:
        kernel: CONVOLVE, ...
        fixed: the arguments that do not change from call to call; it points into `held`.
        x, y: what is read and written.
        other: what is read too: a residual, the other summand.
        constants: scale of x, scale and zero point of other: of layers, whatever x is.
        parallel: whether all threads work.
    """

    kernel: int
    fixed: ctypes.Structure
    held: Any
    x: Tensor
    y: Tensor
    other: Tensor | None = None
    constants: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    parallel: bool = False


class OperationCall(NamedTuple):
    """Describes a call of an operation of PyTorch, whose result is a new tensor or a view."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Tensor


class Refusal(NamedTuple):
    """Says why what was recorded cannot be repeated."""

    why: str


class _Recording(threading.local):
    calls: list[KernelCall | OperationCall | Refusal] | None = None  # None: nobody records
    results: list[Any]  # weak references to tensors that layers handed on meanwhile


recording = _Recording()


def noted(operation: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """Returns what an operation makes of x and others; noted while somebody records, unless that is x itself."""
    y = operation(x, *others)
    if recording.calls is not None and y is not x:
        recording.calls.append(OperationCall(operation, (x, *others), {}, y))
    return y
