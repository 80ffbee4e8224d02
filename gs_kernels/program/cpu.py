"""Makes one call of many recorded ones, by `cpu.cpp`. They hand results on in memory that the next call uses again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.program.recording import KernelCall, recording
from gs_kernels.requantize import passes

ALIGNED = 64  # bytes, of each tensor in the scratch memory; as many lie behind it

size, pointer = ctypes.c_int64, ctypes.c_void_p
FUNCTIONS: dict[str, Sequence[Any]] = {"run_calls": (pointer, size, pointer, pointer, ctypes.c_int)}
NONE = -(1 << 63)


class _Call(ctypes.Structure):
    _fields_ = [
        *(("kernel", size), ("fixed", pointer)),
        *((name, size) for name in ("x", "y", "other")),
        *((name, pointer) for name in ("x_scale", "scale", "zero")),
        ("parallel", size),
    ]


class Program:
    """Runs recorded calls as one.

    Args:
        calls: in their order; each reads what one before it wrote, or what is given.
        given: tensors that they read from outside.
        wanted: tensors that are read behind them.
        functions: the library, default `kernels()`.

    Raises:
        UnsuitableError: if a call reads anything else, or no C++ runs here.
    """

    scratch: int  # bytes that it needs

    def __init__(
        self, calls: Sequence[KernelCall], given: Sequence[Tensor], wanted: Sequence[Tensor], functions: Any = None
    ) -> None:
        functions = kernels() if functions is None else functions
        if functions is None:
            raise UnsuitableError("program/cpu.cpp does not run")  # the log says why
        outside = [t.data_ptr() for t in (*given, *wanted)]
        inside, self.scratch = _places([call for call in calls if call.y.data_ptr() not in outside], calls)
        places = {**inside, **{memory: -1 - i for i, memory in enumerate(outside)}}

        def place(t: Tensor | None) -> int:
            if t is not None and t.data_ptr() not in places:
                raise UnsuitableError("a call reads what no call wrote")
            return NONE if t is None else places[t.data_ptr()]

        written = {t.data_ptr() for t in given}
        made = (_Call * len(calls))()
        for one, call in zip(made, calls, strict=True):
            if not written.issuperset(t.data_ptr() for t in (call.x, call.other) if t is not None):
                raise UnsuitableError("a call reads what no call wrote before")
            written.add(call.y.data_ptr())
            one.kernel, one.fixed, one.parallel = call.kernel, ctypes.addressof(call.fixed), call.parallel
            one.x, one.y, one.other = place(call.x), place(call.y), place(call.other)
            one.x_scale, one.scale, one.zero = (None if t is None else t.data_ptr() for t in call.constants)
        self._run, self._calls, self._count = functions.run_calls, made, len(calls)
        self._held = [(call.fixed, call.held, call.constants) for call in calls]
        self._like = [_without_memory(t) for t in wanted]
        self._nowhere = [None] * len(wanted)
        self._pointers = ctypes.c_void_p * len(outside)

    def __call__(
        self, given: Sequence[Tensor], scratch: Tensor, into: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """Returns the wanted tensors.

        Args:
            given: as in the recorded calls.
            scratch: uint8, at least `self.scratch` elements, which no other call uses.
            into: where to write them; None, or None for one: a new tensor.
        """
        wanted: list[Tensor] = []
        for like, t in zip(self._like, into or self._nowhere, strict=True):
            wanted.append(torch.empty_like(like) if t is None else t)
        pointers = self._pointers(*[t.data_ptr() for t in (*given, *wanted)])
        self._run(self._calls, self._count, scratch.data_ptr(), pointers, torch.get_num_threads())
        return wanted


def _places(writing: Sequence[KernelCall], calls: Sequence[KernelCall]) -> tuple[dict[int, int], int]:
    """Returns where in the scratch memory each result lies, by its address now, and the size of the memory.

    A place is used again once the last call has read what lies there.
    """
    last = {t.data_ptr(): i for i, call in enumerate(calls) for t in (call.x, call.other) if t is not None}
    first = {call.y.data_ptr(): i for i, call in enumerate(calls)}
    made = [call.y for call in writing]
    lives = [(y.nbytes, first[y.data_ptr()], last.get(y.data_ptr(), first[y.data_ptr()])) for y in made]
    places, total = places_in_time(lives)
    return {y.data_ptr(): place for y, place in zip(made, places, strict=True)}, total


def places_in_time(lives: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Returns where in one memory results lie that are not all needed at once, and how many bytes that has.

    lives: the bytes of each, when it is written and when it is read last, in the order of writing.
    """
    places: list[int] = []
    taken: list[tuple[int, int, int]] = []  # from, to, and when it is read last
    total = 0
    for nbytes, written, read in lives:
        taken = [one for one in taken if one[2] >= written]
        room = -(-nbytes // ALIGNED) * ALIGNED + ALIGNED
        start = 0
        for begin, end, _ in sorted(taken):
            if begin - start >= room:
                break
            start = max(start, end)
        places.append(start)
        taken.append((start, start + room, read))
        total = max(total, start + room)
    return places, total


def _without_memory(t: Tensor) -> Tensor:
    """Makes what `torch.empty_like` takes."""
    like = torch.empty_like(t)
    like.untyped_storage().resize_(0)
    return like


@cache
def kernels() -> Any:
    """Returns the library, or None if it does not run here; the log says why."""
    return load_functions("calls in a row", FUNCTIONS, self_test, (_Call,))


def self_test(functions: Any) -> bool:
    """Checks that calls find what they read."""
    if passes.kernels() is None:
        return False
    x, before = torch.linspace(-1, 1, 401), recording.calls
    grid = (64.0, 0.0, 3.0, -128.0, 127.0)
    quantize, add = passes.to_codes_of(401, grid, 0), passes.sum_codes_of((1 / 64, 3.0), (0.5, 0.0), "relu", None)
    assert quantize is not None and add is not None
    calls: list[Any] = []
    recording.calls = calls
    try:
        codes = quantize(x)
        y = add(codes, quantize(x))
    finally:
        recording.calls = before
    (again,) = Program(calls, [x], [y], functions)([x], torch.empty(2048, dtype=torch.uint8))
    return torch.equal(again, y)
