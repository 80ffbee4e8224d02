"""Computes the divergence on a CPU without C++: so many rows at a time that what is made of them stays in a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 16  # fp32, of a part of the logits


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def kl_divergence_in_parts(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    kl, student_sum, teacher_sum = (torch.empty(s.shape[0], dtype=torch.float32, device="cpu") for _ in range(3))
    for rows in _parts(*s.shape):
        u, v = s[rows].float() / temperature, t[rows].float() / temperature
        log_q, log_p = u.log_softmax(-1), v.log_softmax(-1)
        for x, log, sums in ((u, log_q, student_sum), (v, log_p, teacher_sum)):
            sums[rows] = x.amax(-1) - log.amax(-1)
        p = torch.exp(log_p, out=v)
        kl[rows] = torch.linalg.vecdot(p, log_p.sub_(log_q).masked_fill_(p == 0, 0.0))
    return tuple(x.view(student.shape[:-1]) for x in (kl, student_sum, teacher_sum))  # type: ignore[return-value]


def kl_divergence_backward_in_parts(dy: Tensor, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ds = student.new_empty(student.shape)
    s, t, out = (x.reshape(-1, x.shape[-1]) for x in (student, teacher, ds))
    d = dy.reshape(-1, 1)
    for rows in _parts(*s.shape):
        q = (s[rows].float() / temperature).softmax(-1)
        q -= (t[rows].float() / temperature).softmax(-1)
        out[rows] = q.mul_(d[rows] / temperature)
    return ds
