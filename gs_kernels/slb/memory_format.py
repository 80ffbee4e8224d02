"""Tells kernels how a weight lies in memory: in rows like its logits, or with the channels last, by one number HW."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def format_of(ndim: int, channels_last: bool) -> torch.memory_format:
    return CHANNELS_LAST[ndim] if channels_last else torch.contiguous_format


def empty_weight(logits: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = format_of(len(shape), channels_last)
    return torch.empty(shape, dtype=dtype, device=logits.device, memory_format=memory_format)


def filter_size(shape: Sequence[int], channels_last: bool) -> int:
    """Returns HW, pixels of a filter: column n of a row lies at `n % HW * C + n // HW`; 1 if rows are contiguous."""
    return math.prod(shape[2:]) if channels_last else 1


def readable(dw: Tensor) -> tuple[Tensor, int]:
    """Returns dw and its HW (see `filter_size`); copies dw to contiguous rows if it lies in neither order."""
    if dw.is_contiguous():
        return dw, 1
    if dw.dim() in CHANNELS_LAST and dw.is_contiguous(memory_format=CHANNELS_LAST[dw.dim()]):
        return dw, filter_size(dw.shape, True)
    return dw.contiguous(), 1
