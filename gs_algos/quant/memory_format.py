"""Gives results of packed convolutions the strides that the float convolution's would have.

Packed convolutions compute with their channels last whatever they are given. What reads their result may look at its
strides (`.view`), so it is handed on in the order of the float layer: that of ATen, channels-last where the image or
the weight is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def suggested(shape: Sequence[int], strides: Sequence[int]) -> torch.memory_format:
    """Returns the memory format that ATen derives from strides, also where they fit two."""
    if len(shape) not in CHANNELS_LAST or strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[axis] * max(shape[axis], 1)
    return CHANNELS_LAST[len(shape)]


def strides_in(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Returns the strides of a dense tensor, those of `torch.empty(shape, memory_format=memory_format)`."""
    last = memory_format != torch.contiguous_format
    order = (1, *range(len(shape) - 1, 1, -1), 0) if last else range(len(shape) - 1, -1, -1)
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis] if last else max(shape[axis], 1)
    return tuple(strides)


def laid(y: Tensor, strides: Sequence[int]) -> Tensor:
    """Returns y with these dense strides: itself, a view where only axes of size 1 differ, else a copy."""
    if y.stride() == tuple(strides):
        return y
    for n, a, b in zip(y.shape, y.stride(), strides, strict=True):
        if n != 1 and a != b:
            break
    else:
        return y.as_strided(y.shape, strides)
    for form in (torch.contiguous_format, CHANNELS_LAST.get(y.dim())):
        if form is not None and strides_in(y.shape, form) == tuple(strides):
            return y.contiguous(memory_format=form)  # which holds for every size, where a tracer sees it
    return y.new_empty_strided(y.shape, strides).copy_(y)
