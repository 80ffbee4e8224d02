"""Asks Linux for huge pages under a large tensor, whose first write otherwise takes longer than computing it."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

HUGE_FROM = 1 << 22  # bytes


def in_huge_pages(t: Tensor) -> Tensor:
    """Returns t, just allocated; if t is large, Linux is advised to map it in huge pages.

    The faults of a fresh tensor's 4 KB pages take longer than the passes that write it. `THP_MEM_ALLOC_ENABLE=1` makes
    torch do the same for every tensor.
    """
    if sys.platform == "linux" and t.nbytes >= HUGE_FROM:
        first = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = t.data_ptr() + t.nbytes - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return t
