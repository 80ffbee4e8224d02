"""Runs a converted network as it ran before with an input of the same form: a few calls instead of many.

What Python takes between the layers is most of a small network's time. So the second forward of a form of input is
recorded: which kernels ran, and which operations of PyTorch on their results. Later ones run the same at once, kernels
one after another in C++ (`gs_kernels.program`). The input of the recorded forward is a tensor that sees everything that
is done with its values; so where anything else happens with them, as a branch on a value, a write in place or a result
that is kept, the network runs as it is.

A recording is good while the network is unchanged: its modules, their tensors and attributes, and no hooks on any.
Lists and dicts are compared with copies of one level; what other objects and global names hold is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gs_algos.core.modules import swapped_class
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.integer.prepared_call import PREPARED, kind_of
from gs_algos.quant.integer.quantized_tensor import DeferredOutput
from gs_kernels.for_layers import (
    KernelCall,
    OperationCall,
    Program,
    Refusal,
    UnsuitableError,
    is_dense,
    places_in_time,
    recording,
)
from gs_kernels.runtime.torch_private import PLAIN, function_modes, has_global_hooks, tree_leaves, tree_map_only

FORMS = 16  # of input, that a network is recorded for: each holds memory
# what a result depends on in layers of ours; their other attributes are as they were made, or caches
OURS: tuple[str, ...] = ("activation", "defers_add", "output_as_it_lies", "channels_last", "emits_int8")
OURS += ("_producer_grids", "_consumer_grids")
MODULE = {*nn.Module().__dict__, PREPARED} - {"training"}  # what every module has
_values: Any = dict.values
_version = attrgetter("_version")
_chain = chain.from_iterable
aten = torch.ops.aten
# elementwise operations, and those that write the same over their first operand
IN_PLACE: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.silu.default: aten.silu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.tanh.default: aten.tanh_.default,
}


def record_forwards(net: nn.Module) -> None:
    """Lets a live network run as it is recorded; all else about it stays, also the name of its class."""
    if not isinstance(net, RecordsForward | OffFastPath | torch.fx.GraphModule | torch.jit.ScriptModule):
        net.__class__ = swapped_class(RecordsForward, type(net))


class RecordsForward(nn.Module):
    """Runs forwards as one was recorded, where that can be."""

    prefix = ""  # of the class's name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        recordable = type(x) in PLAIN and x.is_cpu and recording.calls is None  # type: ignore[union-attr]
        kind = kind_of(x) if recordable else None  # type: ignore[arg-type]
        if kind is None or function_modes() or has_global_hooks():
            return super().__call__(*args, **kwargs)
        assert x is not None
        forms: dict[Any, _Recorded | None] = self.__dict__.setdefault(PREPARED, {})
        if kind not in forms:
            if len(forms) >= FORMS:
                forms.clear()
            forms[kind] = None  # the next one is recorded: images may have ever new sizes
            return super().__call__(x)
        recorded = forms[kind]
        if recorded is None:
            y, forms[kind] = _record(self, super().__call__, x)
            return y
        if recorded.run is not None and recorded.state.is_same(self):
            return recorded.run(x)
        if recorded.run is not None or (recorded.state.hooked and not recorded.state.has_hooks()):
            forms[kind] = None
        return super().__call__(x)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != PREPARED}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(PREPARED, None)
        return super()._apply(*args, **kwargs)


class _State:
    """Holds what the result of a network depends on besides its input, and tells whether it is still the same.

    It does not hold the network, which holds it: both would stay for the garbage collector.
    """

    def __init__(self, net: nn.Module) -> None:
        modules: list[nn.Module] = [*net.modules()]
        self.inner = modules[1:]
        self.classes = [*map(type, self.inner)]
        self.hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self.hooked = self.has_hooks()
        self.children = [m._modules for m in modules]
        self.held_children = [*map(dict, self.children)]
        registered: list[dict[str, Any]] = [tensors for m in modules for tensors in (m._buffers, m._parameters)]
        self.empty = [one for one in registered if not one]
        self.filled = [one for one in registered if one]
        self.held = [*_chain(map(_values, self.filled))]
        self.tensors: list[Tensor] = [t for t in self.held if t is not None]
        self.versions = [None if t.is_inference() else t._version for t in self.tensors]
        self.trains = any(t.requires_grad for t in self.tensors)
        watched = [(module, name) for module in self.inner for name in _watched(module)]
        self.owners, self.names = [one for one, _ in watched], [name for _, name in watched]
        self.attributes = [_copied(getattr(*one)) for one in watched]
        self.own_names = _watched(net)
        self.own_attributes = [_copied(net.__dict__[name]) for name in self.own_names]
        self.others = [vars(module) for module in self.inner if not isinstance(module, OffFastPath)]
        self.counts = sum(map(len, self.others)), len(vars(net))

    def can_be_seen(self) -> bool:
        """Says whether changes can be seen, and nothing is there that has to see the forward."""
        kept = any(isinstance(value, Tensor) for value in (*self.attributes, *self.own_attributes))
        return not (kept or self.hooked or None in self.versions)

    def has_hooks(self) -> bool:
        return any(self.hooks)

    def is_same(self, net: nn.Module) -> bool:
        """Says whether all is as it was, and the network gives values without gradients."""
        own = net.__dict__
        try:
            return (
                not (any(self.hooks) or any(self.empty) or (self.trains and torch.is_grad_enabled()))
                and self.children == self.held_children
                and all(map(is_, self.held, _chain(map(_values, self.filled))))
                and [*map(_version, self.tensors)] == self.versions
                and [*map(type, self.inner)] == self.classes
                and (sum(map(len, self.others)), len(own)) == self.counts
                and [*map(getattr, self.owners, self.names)] == self.attributes
                and [*map(own.__getitem__, self.own_names)] == self.own_attributes
            )
        except (AttributeError, KeyError):
            return False


def _watched(module: nn.Module) -> list[str]:
    """Lists the attributes of a module that its result may depend on."""
    if isinstance(module, OffFastPath):
        return [name for name in OURS if hasattr(module, name)]
    return [name for name in vars(module) if name not in MODULE]


def _copied(value: Any) -> Any:
    return copy(value) if type(value) in (list, dict, set) else value


class _Recorded(NamedTuple):
    """Holds what was recorded for one form of input: the state of the network, and what runs if that is the same."""

    state: _State
    run: Callable[[Tensor], Tensor] | None


def _record(net: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, _Recorded]:
    """Runs a network and records what runs; returns its result, too."""
    state = _State(net)
    if not state.can_be_seen() or (torch.is_grad_enabled() and state.trains) or x.numel() == 0:
        return forward(x), _Recorded(state, None)
    calls: list[Any] = []
    results: list[Any] = []
    recording.calls, recording.results = calls, results
    try:
        y = forward(DeferredOutput.of(x, x.stride()))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        # a tensor without memory does not do here; if that is not the reason, it fails again
        recording.calls = None
        return forward(x), _Recorded(state, None)
    finally:
        recording.calls, recording.results = None, []
    y = tree_map_only(DeferredOutput, _plain_one, y)
    try:
        if type(y) is not Tensor:
            raise UnsuitableError(f"the result is a {type(y).__name__}")
        if any(one() is not None for one in results) or not state.is_same(net):
            raise UnsuitableError("something else than the result is kept")
        with torch.inference_mode(False), torch.no_grad():
            run = _replay_of(calls, x, y, state.tensors)
        again = run(x)
        if again.stride() != y.stride() or not torch.equal(_bits(again), _bits(y)):
            raise UnsuitableError("the result is not the same")
    except UnsuitableError:
        return y, _Recorded(state, None)
    return y, _Recorded(state, run)


def _plain_one(y: DeferredOutput) -> Tensor:
    return y if y.recorded is None else y.recorded


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor: the address that its memory had, and how it lies there."""

    memory: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(t: Tensor) -> _Place:
        return _Place(t.data_ptr(), tuple(t.shape), t.stride())

    def find(self, found: dict[int, Tensor]) -> Tensor:
        t = found[self.memory]
        same = t.shape == self.shape and t.stride() == self.strides
        return t if same else t.as_strided(self.shape, self.strides)


def _reads(call: KernelCall | OperationCall) -> list[Tensor]:
    if isinstance(call, KernelCall):
        return [t for t in (call.x, call.other) if t is not None]
    return [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]


def _replay_of(calls: Sequence[Any], x: Tensor, y: Tensor, constants: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns what does the recorded calls again, for an input like x, and returns what was y.

    constants: tensors that calls may read and that stay, such as the weight of a float layer.

    Raises:
        UnsuitableError: if they cannot be done again, or read or give anything else.
    """
    refused = next((call.why for call in calls if isinstance(call, Refusal)), None)
    if refused is not None:
        raise UnsuitableError(refused)
    last = {t.data_ptr(): i for i, call in enumerate(calls) for t in _reads(call)}
    last[y.data_ptr()] = len(calls)
    if any(last.get(call.y.data_ptr(), -1) <= i for i, call in enumerate(calls)):
        raise UnsuitableError("a result is not used")  # but for something that is not recorded
    held = {t.data_ptr(): t for t in constants if t.numel()}
    known = {*held, x.data_ptr()}
    steps: list[tuple[_Step, list[int]]] = []  # with what nothing reads behind it
    scratch = 0
    end = 0
    calls, owners = _in_place(calls, x, y, constants)
    # of all tensors in one memory, views too: when one is read last
    last_of = {owners.get(_storage(t), _storage(t)): i for i, call in enumerate(calls) for t in _reads(call)}
    last_of[_storage(y)] = len(calls)
    lives: list[tuple[Tensor, int, int]] = []  # of what programs write for operations, and when
    for kind, some in groupby(calls, type):
        group = [*some]
        end += len(group)
        if kind is KernelCall:
            later = {memory for memory, i in last.items() if i >= end}
            step, nbytes, wanted = _program_of(group, known, later)
            lives += [(t, end - len(group), last_of[_storage(t)]) for t in wanted]
            steps.append((step, [memory for memory, i in last.items() if end - len(group) <= i < end]))
            scratch = max(scratch, nbytes)
        else:
            for number, call in enumerate(group, end - len(group)):
                steps.append((_operation_of(call), [memory for memory, i in last.items() if i == number]))
        for call in group:
            if any(t.data_ptr() not in known for t in _reads(call)):
                raise UnsuitableError("a call reads what no call wrote")
            known.add(call.y.data_ptr())
    if y.data_ptr() not in known:
        raise UnsuitableError("no call wrote the result")
    result, given = _Place.of(y), x.data_ptr()
    # the result is the caller's
    make_memory = _memory_for(scratch, [life for life in lives if life[2] < len(calls)])
    memory: list[_Memory] = []  # of calls that are done

    def run(x: Tensor) -> Tensor:
        found = {**held, given: x}
        try:
            own = memory.pop()  # of no other thread
        except IndexError:
            own = make_memory()
        for step, read in steps:
            step(found, own)
            for one in read:  # its memory is for the next results
                found.pop(one, None)
        memory.append(own)
        return result.find(found)

    return run


def _in_place(
    calls: Sequence[Any], x: Tensor, y: Tensor, constants: Sequence[Tensor]
) -> tuple[list[Any], dict[int, int]]:
    """Returns the calls, operations writing over what they alone still read, and whose memory a result is in."""
    kept = {*map(_storage, (x, y, *constants))}
    last = {_storage(t): i for i, call in enumerate(calls) for t in _reads(call)}
    owners: dict[int, int] = {}
    done: list[Any] = []
    for i, call in enumerate(calls):
        into = IN_PLACE.get(call.func) if isinstance(call, OperationCall) and not call.kwargs else None
        if into is not None and _storage(call.y) not in kept:
            for order in [call.args, call.args[::-1]] if call.func is aten.mul.Tensor else [call.args]:
                first, *others = order
                if not isinstance(first, Tensor):
                    continue
                memory, read = _storage(first), [_storage(t) for t in others if isinstance(t, Tensor)]
                if memory not in (*kept, *read) and last[memory] == i and _same_form(first, call.y):
                    owners[_storage(call.y)] = owners.get(memory, memory)
                    call = call._replace(func=into, args=tuple(order))
                    break
        done.append(call)
    return done, owners


def _same_form(a: Tensor, b: Tensor) -> bool:
    return is_dense(a) and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


class _Memory(NamedTuple):
    """Holds what a replay writes, for the next one too: the pages of a fresh tensor cost as much as its values."""

    scratch: Tensor  # of programs
    results: dict[int, Tensor]  # of programs, that operations read, by the address that they had


_Step: TypeAlias = Callable[[dict[int, Tensor], _Memory], None]  # of a replay: reads and adds what was found so far


def _memory_for(scratch: int, lives: Sequence[tuple[Tensor, int, int]]) -> Callable[[], _Memory]:
    """Returns what makes the memory. lives: results, when each is written, and when read last."""
    places, total = places_in_time([(t.nbytes, first, last) for t, first, last in lives])
    views = [
        (t.data_ptr(), start, t.nbytes, t.dtype, t.shape, t.stride())
        for start, (t, _, _) in zip(places, lives, strict=True)
    ]

    def make() -> _Memory:
        with torch.inference_mode(False), torch.no_grad():  # operations may write into it in any mode
            own, whole = (torch.empty(n, dtype=torch.uint8, device="cpu") for n in (scratch, total))
            results = {
                memory: whole[start : start + nbytes].view(dtype).as_strided(shape, strides, start // dtype.itemsize)
                for memory, start, nbytes, dtype, shape, strides in views
            }
        return _Memory(own, results)

    return make


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _program_of(calls: Sequence[KernelCall], known: set[int], later: set[int]) -> tuple[_Step, int, list[Tensor]]:
    """Returns what runs kernels in one call, the bytes of memory that they need, and what they write for others.

    known, later: the addresses of what there is before, and of what is read behind them.
    """
    read = {t.data_ptr(): t for call in calls for t in _reads(call) if t.data_ptr() in known}
    wanted = {call.y.data_ptr(): call.y for call in calls if call.y.data_ptr() in later}
    program = Program(calls, [*read.values()], [*wanted.values()])

    def step(found: dict[int, Tensor], own: _Memory) -> None:
        into = [*map(own.results.get, wanted)]
        made = program([found[memory] for memory in read], own.scratch, into)
        found.update(zip(wanted, made, strict=True))

    return step, program.scratch, [*wanted.values()]


def _operation_of(call: OperationCall) -> _Step:
    """Returns what calls an operation with tensors in the places of those that it was recorded with."""
    places = [(i, _Place.of(t)) for i, t in enumerate(call.args) if isinstance(t, Tensor)]
    if len(places) != len(_reads(call)):
        raise UnsuitableError("an operation takes tensors in a list, or by name")
    args = [None if isinstance(t, Tensor) else t for t in call.args]
    func, kwargs, memory = call.func, call.kwargs, call.y.data_ptr()

    def step(found: dict[int, Tensor], own: _Memory) -> None:
        given = [*args]
        for i, place in places:
            given[i] = place.find(found)
        found[memory] = func(*given, **kwargs)

    return step
