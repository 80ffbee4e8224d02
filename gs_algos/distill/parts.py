"""Adds up a loss part by part, each with its gradient at once, so that what a part needs is gone before the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Term = Callable[[Tensor, slice], Tensor]


def sum_of_parts(logits: Tensor, term: Term, rows: int) -> Tensor:
    """Returns the sum of `term(logits[part], part)` over parts of so many rows, a number; its gradient goes to logits.

    The gradient is computed with the sum, and held until the backward, which there can be one of.
    """
    return _SumOfParts.apply(logits, term, rows)  # type: ignore[no-any-return]


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, term: Term, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        ctx.gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), device=logits.device)
        for first in range(0, len(logits), rows):
            part = slice(first, first + rows)
            with torch.set_grad_enabled(wanted):
                own = logits[part].detach().requires_grad_(wanted)
                loss = term(own, part)
            if wanted:
                (ctx.gradient[part],) = torch.autograd.grad(loss, own)
            total += loss.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        if ctx.gradient is None:
            raise RuntimeError("Distill.loss: there can be one backward where the teacher sees parts, got a second")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(dys[0].to(gradient.dtype)), None, None
