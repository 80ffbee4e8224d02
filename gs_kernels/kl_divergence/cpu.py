"""Computes the divergence on a CPU by `cpu.cpp`, or by `parts.py` where that does not compile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.huge_pages import in_huge_pages
from gs_kernels.cpu.library import FLOATS, load_functions
from gs_kernels.kl_divergence.parts import kl_divergence_backward_in_parts, kl_divergence_in_parts
from gs_kernels.kl_divergence.ref import kl_divergence_backward_ref, kl_divergence_ref, log_sums_ref

PARALLEL_FROM = 1 << 13  # logits, from which a second thread pays

size, number, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class _Divergence(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("student", "teacher")),
        *((name, size) for name in ("rows", "classes", "student_stride", "teacher_stride")),
        ("temperature", ctypes.c_double),
        *((name, number) for name in ("student_floats", "teacher_floats", "threads")),
    ]


_DIVERGENCE = ctypes.POINTER(_Divergence)
FUNCTIONS: dict[str, Sequence[Any]] = {
    "kl_divergence": (_DIVERGENCE, *[pointer] * 3),
    "kl_divergence_backward": (_DIVERGENCE, *[pointer] * 4),
}


@cache
def kernels() -> Any:
    """Returns the functions of `cpu.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("kl_divergence", FUNCTIONS, _self_test, (_Divergence,))


def _self_test(functions: Any) -> bool:
    """Compares two rows, one with a class that is ruled out, and their gradient with the reference."""
    student, teacher = (torch.linspace(-20, end, 2 * 37).sin().view(2, 37) * 5 for end in (31, 47))
    teacher[1, 7] = -torch.inf
    got = _run(functions, student, teacher, 2.0)
    sums = log_sums_ref(student, teacher, temperature=2.0)
    want = kl_divergence_ref(student, teacher, temperature=2.0), *sums
    ds = _run_backward(functions, torch.ones(2), student, teacher, *sums, 2.0)
    wanted = kl_divergence_backward_ref(torch.ones(2), student, teacher, *sums, temperature=2.0)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip((*got, ds), (*want, wanted), strict=True))


def _rows_of(x: Tensor) -> Tensor:
    """Reshapes x to `[rows, classes]`: a view if its rows are evenly spaced, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _divergence(s: Tensor, t: Tensor, temperature: float) -> _Divergence:
    """Makes the struct of two matrices of rows."""
    threads = torch.get_num_threads() if s.numel() >= PARALLEL_FROM else 1
    places, strides = (s.data_ptr(), t.data_ptr()), (s.stride(0), t.stride(0))
    return _Divergence(*places, *s.shape, *strides, temperature, FLOATS[s.dtype], FLOATS[t.dtype], threads)


def _run(functions: Any, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = _rows_of(student), _rows_of(teacher)
    kl, student_sum, teacher_sum = found = tuple(
        torch.empty(student.shape[:-1], dtype=torch.float32, device="cpu") for _ in range(3)
    )
    functions.kl_divergence(_divergence(s, t, temperature), *(x.data_ptr() for x in found))
    return kl, student_sum, teacher_sum


def _run_backward(
    functions: Any,
    dy: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_sum: Tensor,
    teacher_sum: Tensor,
    temperature: float,
) -> Tensor:
    s, t = _rows_of(student), _rows_of(teacher)
    ds = in_huge_pages(torch.empty(student.shape, dtype=student.dtype, device="cpu"))
    by_row = tuple(x.contiguous() for x in (dy, student_sum, teacher_sum))
    pointers = (x.data_ptr() for x in (*by_row, ds))
    functions.kl_divergence_backward(_divergence(s, t, temperature), *pointers)
    return ds


def kl_divergence_cpu(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    functions = kernels()
    if functions is None:
        return kl_divergence_in_parts(student, teacher, temperature)
    return _run(functions, student, teacher, temperature)


def kl_divergence_backward_cpu(
    dy: Tensor, student: Tensor, teacher: Tensor, student_sum: Tensor, teacher_sum: Tensor, temperature: float
) -> Tensor:
    functions = kernels()
    if functions is None:
        return kl_divergence_backward_in_parts(dy, student, teacher, temperature)
    return _run_backward(functions, dy, student, teacher, student_sum, teacher_sum, temperature)
