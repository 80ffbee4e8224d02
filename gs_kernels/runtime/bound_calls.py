"""Repeats the launches of an op's call without the Python that led to them.

What a call of an op launches on a GPU depends on the form of its tensors (shape, strides, dtype, device, whether the
address is a multiple of 16) and on its other arguments, never on values in memory. So the first call of a form is
recorded: which compiled kernels it launches with which numbers, and which of the pointers are arguments or freshly
allocated. A later call of the same form allocates and launches the same, in a few microseconds. Nothing of a call is
kept but its form: no tensor and no address, so that weights may be moved, loaded and copied, and layers of one form
share one bound call.

A call cannot be bound if it does anything else: if a pointer is neither a whole argument nor `fresh` nor `lasting`, or
the result is not `fresh`. Then every call takes the long way, which is always right.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime import device
from gs_kernels.runtime.torch_private import is_eager
from gs_kernels.runtime.triton_private import Launch, can_launch, current_stream, launcher

MAX_CALLS = 1 << 14  # forms: rows of x differ most, and one takes a kilobyte

_calls: dict[tuple[Any, ...], BoundCall | None] = {}  # None: cannot be bound
_kept: dict[tuple[int, Any], tuple[Any, Any, int, Tensor]] = {}  # by whose: until when, its state, stream


@dataclass
class Recording:
    """Notes what a call does.

    fresh: the tensors it allocates. lasting: tensors that live on. kept: (tensor, how it is made, of what).
    launches: (kernel, compiled, grid, args).
    """

    fresh: list[Tensor] = field(default_factory=list)
    lasting: list[Tensor] = field(default_factory=list)
    kept: list[tuple[Tensor, Callable[[Tensor], Tensor], Tensor]] = field(default_factory=list)
    launches: list[tuple[Any, Any, tuple[int, ...], dict[str, Any]]] = field(default_factory=list)


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def fresh(t: Tensor) -> Tensor:
    """Returns t, which the launcher that calls this has just allocated: nothing but its launches may write into it."""
    recording = _thread.recording
    if recording is not None:
        recording.fresh.append(t)
    return t


def lasting(t: Tensor) -> Tensor:
    """Returns t, which is no argument, but lives as long as the process and never changes: a table of constants."""
    recording = _thread.recording
    if recording is not None:
        recording.lasting.append(t)
    return t


def keep(make: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Returns `make(t)` of an argument t; on a GPU, made once while t lives and does not change.

    Changes through `.data` that leave its address go unnoticed.
    """
    if not is_eager(t) or not device.on_gpu(t) or t.is_inference():
        return make(t)
    key, state, stream = (id(t), make), (t._version, t.data_ptr()), current_stream(device.index_of(t))
    known = _kept.get(key)
    # on another stream it may not be ready; a graph starts when all is
    if known is not None and known[1] == state and (known[2] == stream or device.capturing()):
        made = known[3]
    else:
        made = make(t)
        if not device.capturing():  # what a capture makes holds nothing before the graph is replayed
            _kept[key] = weakref.ref(t, lambda _: _kept.pop(key, None)), state, stream, made
    if _thread.recording is not None:
        _thread.recording.kept.append((made, make, t))
    return made


def note_launch(kernel: Any, compiled: Any, grid: tuple[int, ...], args: Sequence[Any], flags: dict[str, Any]) -> None:
    recording = _thread.recording
    if recording is not None:
        by_name = dict(zip(kernel.arg_names, args, strict=False)) | flags
        recording.launches.append((kernel, compiled, grid, by_name))


def find(key: tuple[Any, ...]) -> BoundCall | None:
    """Returns the bound call with this key; None while another call is recorded, which has to see every launch."""
    return _calls.get(key) if _thread.recording is None else None


def record(key: tuple[Any, ...], operands: Sequence[Tensor], run: Callable[[], Any]) -> Any:
    """Returns `run()`, and binds what it launches to the key.

    operands: all tensors among the arguments.
    """
    if _thread.recording is not None or _calls.get(key, 0) is None:
        return run()
    recording = _thread.recording = Recording()
    try:
        result = run()
    finally:
        _thread.recording = None
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = bind(recording, operands, result)
    return result


def forget() -> None:
    """Has every call take the long way once more: for whoever changes what launches are computed by."""
    _calls.clear()


@dataclass(frozen=True)
class BoundCall:
    """Holds what a call allocates and launches: `call(operands)` does it again.

    allocations: shape, strides and dtype of each.
    lasting: tensors that are the same in every call.
    kept: how a tensor is made that is kept beside an operand, and the position of that.
    launch: takes the index of the GPU, and None, operands, allocations, lasting and kept tensors in one list.
    results: positions of the results among the allocations; one alone is not a tuple.
    """

    index: int
    allocations: tuple[tuple[Sequence[int], Sequence[int], torch.dtype], ...]
    lasting: tuple[Tensor, ...]
    kept: tuple[tuple[Callable[[Tensor], Tensor], int], ...]
    launch: Callable[[int, Sequence[Any]], None]
    results: tuple[int, ...] | int

    def __call__(self, operands: list[Tensor]) -> Any:
        if self.index != device.current_index():
            with torch.cuda.device(self.index):
                return self(operands)
        make, made = operands[0].new_empty_strided, []  # which takes half as long as new_empty
        for shape, strides, dtype in self.allocations:
            made.append(make(shape, strides, dtype=dtype))
        values = [None, *operands, *made, *self.lasting]
        for how, at in self.kept:
            values.append(keep(how, operands[at]))
        self.launch(self.index, values)
        results = self.results
        return made[results] if isinstance(results, int) else tuple(made[i] for i in results)


def bind(recording: Recording, operands: Sequence[Tensor], result: Any) -> BoundCall | None:
    """Makes the bound call of what was recorded; None if something in it is not accounted for."""
    index = device.index_of(operands[0])
    places: dict[int, int] = {}
    known = [*operands, *recording.fresh, *recording.lasting, *(t for t, _, _ in recording.kept)]
    if any(device.index_of(t) != index for t in known) or not recording.launches:
        return None
    for i, t in enumerate(known):
        if t.numel() and places.setdefault(t.data_ptr(), i) != i:
            return None  # two arguments in one place: which of them is meant cannot be told
    results = result if isinstance(result, tuple) else (result,)
    shown: dict[int, Tensor] = {}  # what a fresh tensor is returned as
    for t in results:
        at = places.get(t.data_ptr(), -1) - len(operands) if isinstance(t, Tensor) and t.numel() else -1
        if not 0 <= at < len(recording.fresh) or at in shown or not _same_memory(t, recording.fresh[at]):
            return None
        shown[at] = t
    launches = []
    for kernel, compiled, grid, by_name in recording.launches:
        args = [by_name[name] for name in kernel.arg_names]
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        picks = []
        for a in args[: tensors[-1] + 1]:
            at = places.get(a.data_ptr(), -1) if isinstance(a, Tensor) else -1
            if a is not None and (at < 0 or not _same_memory(a, known[at])):
                return None
            picks.append(at + 1)
        if not can_launch(kernel, compiled):
            return None
        # itemgetter of one place gives no tuple
        pick = itemgetter(*picks) if len(picks) > 1 else lambda values, at=picks[0]: (values[at],)
        x, y, z = (*grid, 1, 1)[:3]
        launches.append(Launch(compiled, (x, y, z), pick, tuple(args[len(picks) :])))
    kept = []
    for _, how, t in recording.kept:
        at = places.get(t.data_ptr(), -1)
        if not 0 <= at < len(operands) or operands[at] is not t:
            return None
        kept.append((how, at))
    made = [shown.get(i, t) for i, t in enumerate(recording.fresh)]
    allocations = tuple((t.shape, t.stride(), t.dtype) for t in made)
    places_of = tuple(shown) if isinstance(result, tuple) else next(iter(shown))
    return BoundCall(index, allocations, tuple(recording.lasting), tuple(kept), launcher(launches), places_of)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Returns whether a is b, or all of it in other axes, or as other numbers of its size."""
    return a.data_ptr() == b.data_ptr() and a.itemsize == b.itemsize and a.numel() == b.numel()
