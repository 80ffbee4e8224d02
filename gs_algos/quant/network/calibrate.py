"""Runs data through a prepared model to set the ranges of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch.distributed as dist
from torch import nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.batches import InputsOf, checked_batches
from gs_algos.core.modules import TRACING
from gs_algos.core.progress import progress
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, calibrated_range


def observe(
    who: str,
    model: nn.Module,
    quantizers: Mapping[str, ActivationQuantizer],
    batches: Iterable[Inputs] | None,
    forward_loop: Callable[[nn.Module], None] | None = None,
    *,
    example: Inputs | None = None,
    provisional: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Runs the data through the model with activations in float, then sets every range.

    Args:
        batches, forward_loop: the data; an error leaves all ranges as they were.
        example: inputs whose form says which part of a batch is meant, see `InputsOf`.
        provisional: the first training batch replaces the ranges.

    Raises:
        TypeError: if the batches are no iterable, or the loop no function.
        ValueError: if the inputs do not run through the model, no batch did, or a quantizer saw NaN or Inf, or nothing
            but empty batches.
    """
    if forward_loop is not None and not callable(forward_loop):
        got = type(forward_loop).__name__
        raise TypeError(f"{who}: forward_loop must be a function of the model, got {got}; give batches=")
    batches = () if batches is None else checked_batches(who, batches)
    inputs_of = InputsOf(who, model, example)
    for quantizer in quantizers.values():
        quantizer.start_calibration()
    try:
        with evaluating(model):
            if forward_loop is not None:
                with TRACING:
                    forward_loop(model)
            for batch in progress(batches, "calibrating"):
                run(model, inputs_of(batch), who)
        ranges = {name: calibrated_range(q, name, group) for name, q in quantizers.items()}
    finally:
        for quantizer in quantizers.values():
            quantizer.stop_calibration()
    for name, extremes in ranges.items():
        shape = quantizers[name].empty_shape
        if extremes is None and shape is not None:
            raise ValueError(f"{who}: what {name} sees must hold at least one element, got shape {shape}")
    if quantizers and all(extremes is None for extremes in ranges.values()):
        raise ValueError(f"{who}: at least one batch must run through the prepared model, got none")
    for name, extremes in ranges.items():
        if extremes is not None:
            quantizers[name].set_initial_range(extremes, provisional)
