"""Times the forward of networks: in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gs_algos.core.algorithm import Inputs, evaluating, split_inputs

WARM_UP = 3  # calls, of which the first compile, prepare and allocate
LEAST = 5  # calls that are timed
SHORT = 0.1  # seconds of a call that is none
FEW = 3  # those of calls that take long


@dataclass(frozen=True)
class Timing:
    """Holds milliseconds of a call: the 20th, 50th and 80th percentile over so many calls."""

    p20: float
    p50: float
    p80: float
    calls: int


def time_in_turns(calls: Sequence[Callable[[], Any]], device: torch.device | str, seconds: float) -> list[Timing]:
    """Times calls in turns, a b a b ..., for `seconds` each, 5 times at least, after three calls of warm-up.

    Where a call takes longer than `seconds`, 3 times must do, after one. device: where they run; a GPU is waited for
    after each call.
    """
    cuda = torch.device(device).type == "cuda"

    def ms_of(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - started)

    least = LEAST
    for call in calls:
        for _ in range(WARM_UP):
            if ms_of(call) > 1000 * max(seconds, SHORT):
                least = FEW
                break
    times: list[list[float]] = [[] for _ in calls]
    while calls and (len(times[0]) < least or sum(map(sum, times)) < 1000 * seconds * len(calls)):
        for own, call in zip(times, calls, strict=True):
            own.append(ms_of(call))
    return [_summary(own) for own in times]


def forward_ms(net: nn.Module, inputs: Inputs, seconds: float = 0.3) -> Timing:
    """Times forwards in eval mode without gradients."""
    args, kwargs = split_inputs(inputs)
    device = next((t.device for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    with evaluating(net):
        return time_in_turns([lambda: net(*args, **kwargs)], device, seconds)[0]


def _summary(ms: list[float]) -> Timing:
    ordered = sorted(ms)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered))
