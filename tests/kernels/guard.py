"""Runs every op on tensors that lie against pages which may not be touched: `python -m tests.kernels.guard`.

A load or store one element outside a tensor ends the process by SIGSEGV, where a mask on the result would have hidden
it. The last line printed names the op and the shape.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import partial

import torch
from torch import Tensor

from gs_kernels.runtime.opspec import map_tensors, specs
from tests.helpers import gradients, tensors

PROT_NONE = 0  # of sys/mman.h
MOST = 6000  # elements of x: more only takes longer
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """A dense copy of t whose last (else first) byte is the last (first) that may be read."""
    page = mmap.PAGESIZE
    inside = -(-max(t.nbytes, 1) // page) * page
    pages = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for guard in (start, start + page + inside):
        if _libc.mprotect(ctypes.c_void_p(guard), page, PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    _kept.append(pages)
    first = start + page + (inside - t.nbytes if at_end else 0)
    buffer = (ctypes.c_char * max(t.nbytes, 1)).from_address(first)
    copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel()).view(t.shape)
    return copy.copy_(t)


def main() -> None:
    for spec in specs():
        dtype = next(iter(spec.tol))
        for shape in spec.test_shapes:
            for at_end in (True, False):
                case = spec.make(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
                if not isinstance(case.args[0], Tensor) or case.args[0].numel() > MOST:
                    continue
                sys.stdout.write(f"{spec.name} {shape} {'end' if at_end else 'start'}\n")
                sys.stdout.flush()
                args = [map_tensors(partial(guarded, at_end=at_end), a) for a in case.args]
                leaves = [args[i].requires_grad_() for i in case.grad_args]
                ys = tensors(spec.run(*args, **case.kwargs))
                if leaves:
                    gradients(ys, leaves, [guarded(torch.ones_like(y), at_end) for y in ys])


if __name__ == "__main__":
    main()
