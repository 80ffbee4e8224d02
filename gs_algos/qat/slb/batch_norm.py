"""Recalibrates batch norms: running statistics of the weights that inference uses, from a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.batches import InputsOf, checked_batches
from gs_algos.core.progress import progress
from gs_kernels.runtime.torch_private import _BatchNorm


def calibrate_norms(
    who: str,
    model: nn.Module,
    batches: Iterable[Inputs],
    group: dist.ProcessGroup | None = None,
    example: Inputs | None = None,
) -> None:
    """Sets running means and variances to the mean of those of the batches, all else in eval mode.

    Under torch.distributed each rank shows its own batches, and all ranks get the mean of theirs.

    Raises:
        ValueError: if there is no batch, or one does not run through the model. The statistics are then as before.
    """
    batches, inputs_of = checked_batches(who, batches), InputsOf(who, model, example)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    seen = 0
    with _collecting(model, norms):
        for batch in progress(batches, "calibrating batch norms"):
            run(model, inputs_of(batch), who)
            seen += 1
        if not seen:
            raise ValueError(f"{who}: at least one batch must run through the model, got none")
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                _mean_of_ranks(statistic, group)  # type: ignore[arg-type]


@contextmanager
def _collecting(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Sets eval mode but for the norms, which average what they see; an error gives them their statistics back."""
    momenta = [norm.momentum for norm in norms]
    before = [[None if b is None else b.clone() for b in norm._buffers.values()] for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True
            yield
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for own, old in zip(norm._buffers.values(), buffers, strict=True):
                if own is not None and old is not None:
                    own.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def _mean_of_ranks(t: Tensor, group: dist.ProcessGroup | None) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(t, group=group)
        t.div_(dist.get_world_size(group))
