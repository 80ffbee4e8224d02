"""Computes the divergence in the shortest torch that says it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence_ref(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def log_sums_ref(student: Tensor, teacher: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(x / T) of each row."""
    return (student.float() / temperature).logsumexp(-1), (teacher.float() / temperature).logsumexp(-1)


def kl_divergence_backward_ref(
    dy: Tensor, student: Tensor, teacher: Tensor, student_sum: Tensor, teacher_sum: Tensor, *, temperature: float
) -> Tensor:
    q = (student.float() / temperature - student_sum[..., None]).exp()
    p = (teacher.float() / temperature - teacher_sum[..., None]).exp()
    return ((q - p) * (dy / temperature)[..., None]).to(student.dtype)
