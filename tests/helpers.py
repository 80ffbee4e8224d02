"""Inputs behind a fence of NaN, outputs that start as NaN, and comparisons that say how far off a result is."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import HISTORY
from gs_kernels.runtime.dispatch import INTERPRET

BORDER = 64  # elements before and after; a multiple of 16 bytes in every dtype
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")


def poison(dtype: torch.dtype) -> float | int:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def fenced(t: Tensor, layout: str = "dense") -> Tensor:
    """A copy of t in a buffer that is NaN (the largest integer) wherever t is not.

    layout: "dense" as t; "sliced" with gaps of 3 between rows; "reversed" with its axes in reverse order in memory;
    "spread" with a gap after every element.
    """
    shape = list(t.shape)
    order = list(range(t.dim()))[:: -1 if layout == "reversed" else 1]
    padded = [shape[d] for d in order]
    if layout in ("sliced", "spread") and padded:
        padded[-1] = padded[-1] + 3 if layout == "sliced" else padded[-1] * 2
    buffer = torch.full(
        (BORDER + torch.Size(padded).numel() + BORDER,), poison(t.dtype), dtype=t.dtype, device=t.device
    )
    strides = [0] * t.dim()
    step = 1
    for d, size in zip(reversed(order), reversed(padded), strict=True):
        strides[d] = step
        step *= size
    if layout == "spread" and t.dim():
        strides[-1] = 2
    view = buffer.as_strided(shape, strides, BORDER)
    view.copy_(t)
    return view


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (the largest integer): an element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], dys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of those outputs that have one."""
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    return torch.autograd.grad([y for y, _ in pairs], inputs, [dy for _, dy in pairs], materialize_grads=True)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted (over 1 if that is 0)."""
    difference, size = ((t.double()).square().mean().sqrt().item() for t in (got.double() - want.double(), want))
    return difference / (size or 1.0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def frames(call: Callable[[], Any]) -> tuple[int, int]:
    """Counts the Python frames of ours that a call runs: how many lie above each other at most, and how many in all.

    The call runs some times before, so that what is made once is made.
    """
    ours = tuple(f"{Path(__file__).parents[1] / name}{os.sep}" for name in ("gs_kernels", "gs_algos"))
    depth = deepest = calls = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest, calls
        if event in ("call", "return") and frame.f_code.co_filename.startswith(ours):
            depth += 1 if event == "call" else -1
            calls += event == "call"
            deepest = max(deepest, depth)

    for _ in range(3):
        call()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return deepest, calls


class Untouched:
    """Everything a caller can see of a model, to compare with later."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.state = net, {key: value.clone() for key, value in net.state_dict().items()}
        self.facts = self._facts()

    def _facts(self) -> list[Any]:
        modules = [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in self.net.named_modules()]
        entries = copy.deepcopy(self.net.__dict__.get(HISTORY))
        return [modules, [(name, id(p)) for name, p in self.net.named_parameters()], entries]

    def __bool__(self) -> bool:
        state = self.net.state_dict()
        return (
            self._facts() == self.facts
            and list(state) == list(self.state)
            and all(torch.equal(state[key].nan_to_num(7), value.nan_to_num(7)) for key, value in self.state.items())
        )


@contextlib.contextmanager
def small_disk(nbytes: int) -> Iterator[None]:
    """No file may grow beyond `nbytes`: what a full disk does, for this process alone."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
