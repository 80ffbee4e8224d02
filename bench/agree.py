"""Checks that a provider computes what the reference computes, which is the gate before any timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.opspec import Case, Tol

NEARLY = 1e-3  # share of elements that may differ (another rounding of ties) in a provider that is still timed
NEARLY_GRAD = NEARLY**0.5  # where an element differs its gradient may flip: a share s gives an RMS error of sqrt(s)


@dataclass(frozen=True)
class Agreement:
    """Says how well outputs agree: mismatch is the worst share of elements, grad_error the worst relative RMS."""

    mismatch: float
    grad_error: float
    grad_tol: float

    @property
    def full(self) -> bool:
        return self.mismatch == 0 and self.grad_error <= self.grad_tol

    @property
    def nearly(self) -> bool:
        return self.mismatch <= NEARLY and self.grad_error <= max(self.grad_tol, NEARLY_GRAD)


def outputs_of(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)]


def step(run: Callable[..., Any], case: Case, dys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of one call and, with `dys` (one per output), the gradients of the inputs that require one."""
    outputs = outputs_of(run(*case.args, **case.kwargs))
    inputs = [a for a in case.args if isinstance(a, Tensor) and a.requires_grad]
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=False) if y.requires_grad]
    if not inputs or not pairs:
        return outputs, []
    grads = torch.autograd.grad([y for y, _ in pairs], inputs, [dy for _, dy in pairs], materialize_grads=True)
    return outputs, list(grads)


def _mismatch(got: Tensor, want: Tensor, tol: Tol) -> float:
    """Returns the share of elements with `|got - want| > atol + rtol * |want|`; NaN equals NaN. 1 for another shape."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return 1.0
    close = torch.isclose(got.double(), want.double(), rtol=tol.rtol, atol=tol.atol, equal_nan=True)
    return (~close).double().mean().item() if close.numel() else 0.0


def _grad_error(got: Tensor, want: Tensor) -> float:
    error, scale = ((t.double().square().mean().sqrt().item()) for t in (got.double() - want.double(), want))
    return error / scale if scale else float("inf") if error else 0.0


def agreement(
    run: Callable[..., Any],
    case: Case,
    dys: Sequence[Tensor],
    want: tuple[Sequence[Tensor], Sequence[Tensor]],
    tol: Tol,
    grad_tol: float,
) -> Agreement:
    """Compares one call with the outputs and gradients that `step` gave for the reference."""
    outputs, grads = step(run, case, dys)
    if len(outputs) != len(want[0]) or len(grads) != len(want[1]):
        return Agreement(1.0, float("inf"), grad_tol)
    mismatches = [_mismatch(got, wanted, tol) for got, wanted in zip(outputs, want[0], strict=True)]
    errors = [_grad_error(got, wanted) for got, wanted in zip(grads, want[1], strict=True)]
    return Agreement(max(mismatches, default=0.0), max(errors, default=0.0), grad_tol)
