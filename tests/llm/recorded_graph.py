"""A CUDA graph that needs no GPU: the operators of a step on their tensors, run again without the step's Python.

What a real capture would refuse, or freeze into the graph without a word, is refused here: values that Python reads,
tensors made of Python values, shapes that depend on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.torch_private import TorchDispatchMode, tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
FROM_THE_HOST = {aten.lift_fresh.default}
SHAPES_BY_VALUE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class Recorder(TorchDispatchMode):
    """Keeps every operator that runs, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"capture: Python reads a value by {func}, which a graph could not repeat")
        if func in FROM_THE_HOST:
            raise RuntimeError("capture: a tensor is made of a Python value, a copy that a graph would not repeat")
        if func in SHAPES_BY_VALUE or (func is aten.index.Tensor and _by_mask(args[1])):
            raise RuntimeError(f"capture: the shape of {func} depends on values")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Runs the operators again; results go into the memory of the first ones."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                assert old.shape == new.shape, func
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class RecordedGraphs:
    """What a `Decoder` takes as `capture`. `made`: how many graphs; `replays`: how often any of them ran."""

    def __init__(self) -> None:
        self.made = self.replays = 0
        self.recorder = Recorder()

    def __call__(self, step: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
        step()
        undo()
        with self.recorder:
            step()
        undo()  # a capture runs nothing, and this one did
        self.made += 1

        def replay() -> None:
            self.replays += 1
            self.recorder.replay()

        return replay
