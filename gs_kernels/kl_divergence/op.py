"""Divergence of a student from its teacher: implementations, registration, the public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.kl_divergence.cpu import kl_divergence_backward_cpu, kl_divergence_cpu
from gs_kernels.kl_divergence.ref import kl_divergence_backward_ref, kl_divergence_ref, log_sums_ref
from gs_kernels.pack.checks import FLOATS
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register, save, saved

WHO = "kl_divergence"


def _ref(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    kl = kl_divergence_ref(student, teacher, temperature=temperature)
    return kl, *log_sums_ref(student, teacher, temperature=temperature)


def _backward_ref(
    dy: Tensor, student: Tensor, teacher: Tensor, student_sum: Tensor, teacher_sum: Tensor, temperature: float
) -> Tensor:
    ds = kl_divergence_backward_ref(dy, student, teacher, student_sum, teacher_sum, temperature=temperature)
    return ds.contiguous()


def _fake(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    kl, student_sum, teacher_sum = (student.new_empty(student.shape[:-1], dtype=torch.float32) for _ in range(3))
    return kl, student_sum, teacher_sum


def _backward_fake(dy: Tensor, student: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape)


def _setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, student_sum, teacher_sum = output
    tensors = {"student": inputs.student, "teacher": inputs.teacher}
    save(ctx, **tensors, student_sum=student_sum, teacher_sum=teacher_sum, temperature=inputs.temperature)


def _gradient(ctx: Any, wanted: set[str], dy: Tensor, *_: Tensor) -> dict[str, Tensor | None]:
    return {"student": _backward(dy, *saved(ctx))}


def _no_second_gradient(ctx: Any, wanted: set[str], *grads: Tensor) -> dict[str, Tensor | None]:
    raise RuntimeError(f"{WHO}: its gradient has no gradient of its own; call backward without create_graph=True")


KL_DIVERGENCE = implementations("kl_divergence", _ref, kl_divergence_cpu)
BACKWARD = implementations("kl_divergence_backward", _backward_ref, kl_divergence_backward_cpu)
_run = register(
    "kl_divergence(Tensor student, Tensor teacher, float temperature) -> (Tensor, Tensor, Tensor)",
    KL_DIVERGENCE,
    _fake,
    _gradient,
    _setup,
)
_backward = register(
    "kl_divergence_backward(Tensor dy, Tensor student, Tensor teacher, Tensor student_sum, Tensor teacher_sum,"
    " float temperature) -> Tensor",
    BACKWARD,
    _backward_fake,
    _no_second_gradient,
)


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Computes KL(p || q) of each row: `sum_v p_v log(p_v / q_v)`, p and q softmax of `teacher / T`, `student / T`.

    In fp32. The softmax is never stored, and nothing else of the size of the logits: the gradient, `(q - p) * dy / T`,
    reads the logits again. The teacher gets none. A class that the teacher rules out (-inf) adds 0.

    Args:
        student: `[..., V]`, fp32 / fp16 / bf16. Here and below, what is not made of evenly spaced rows is copied.
        teacher: `[..., V]`, fp32 / fp16 / bf16.
        temperature: T > 0, finite.

    Returns:
        `[...]` fp32. NaN logits make NaN.

    Raises:
        ValueError: if shapes or devices disagree, there are no classes, T is out of range, or the teacher needs a
            gradient.
        TypeError: if a dtype is none of the above.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"{WHO}: {name} must be float32 / float16 / bfloat16, got {getattr(x, 'dtype', type(x))}")
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"{WHO}: student must be [..., V] with V >= 1, got {list(student.shape)}")
    if teacher.shape != student.shape or teacher.device != student.device:
        raise ValueError(
            f"{WHO}: teacher must be {list(student.shape)} on {student.device}, as student is, got "
            f"{list(teacher.shape)} on {teacher.device}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{WHO}: temperature must be finite and > 0, got {temperature}")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{WHO}: teacher must need no gradient, got one that does; detach it")
    return _run(student, teacher, float(temperature))[0]  # type: ignore[no-any-return]
