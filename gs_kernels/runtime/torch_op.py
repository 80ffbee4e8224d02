"""Makes a `torch.library` op that eager mode, autograd, `torch.compile` and `torch.export` all understand.

`torch.library.triton_op` does the same and imports triton at registration, which importing gs_kernels must not.

An op is declared once, with the arguments that its implementations take. Some of them are objects, such as a packed
weight, that no schema of torch holds: they travel whole as far as our own code goes, and are flattened into tensors and
numbers (`Carried`) only where torch has to see the call. A call takes one of four ways:

    public function: checks the arguments, unless `Op.repeat` knows them
     |
    Op.__call__(x, weight, bias, ...)                    whole arguments
     |-- 1. eager, no gradient ------------------------> an implementation; on a GPU as a bound call, where one can be
     |-- 2. eager, with a gradient ---- flat ----------> autograd.Function: an implementation, then `gradient`
     '-- a tracer, a transform or a subclass of tensors has to see it
          |
         torch.ops.gs_kernels.<name>(x, codes, scale, ..., source)            flat arguments
          |-- 3. torch.compile functionalizes ---------> traces an implementation: Triton launches on a GPU, else plain
          |                                              ATen, which the compiler can fuse
          '-- 4. everybody else -----------------------> the op as one node, which `torch.export` keeps: `fake` for
                                                         fake tensors, an implementation for others, `gradient`
"""

from __future__ import annotations

import hashlib
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime import bound_calls, device
from gs_kernels.runtime.call_form import make_form
from gs_kernels.runtime.dispatch import Impl, choose
from gs_kernels.runtime.torch_private import (
    PLAIN,
    FunctionalTensorMode,
    is_eager,
    is_plain_call,
    is_view,
    keeps_triton_ops,
    transform_of,
    tree_map,
    wants_tangents,
)
from gs_kernels.runtime.triton_private import launches_directly

NAMESPACE = "gs_kernels"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

OPS: dict[str, Op] = {}  # as registered, by name


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# every op takes this as its last argument: compiler caches know an op by name and arguments, not by what its body does
SOURCE = _hash_sources()


@dataclass(frozen=True)
class Carried:
    """Describes a class of objects that a schema carries as several plain arguments.

    Args:
        cls: the class; a schema names it as a type.
        schema: what stands there instead, as torch writes it, e.g. "Tensor codes, int bits".
        flatten: gives the plain arguments of an object.
        unflatten: makes the object of them.
        tensors: its attributes that may be tensors.
    """

    cls: type
    schema: str
    flatten: Callable[[Any], Sequence[Any]]
    unflatten: Callable[..., Any]
    tensors: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.schema.split(","))


_carried: dict[type, Carried] = {}  # what registered ops carry


class Op:
    """Calls an op with whole arguments, in the order of its schema; see the picture above."""

    def __init__(
        self,
        schema: str,
        impls: Sequence[Impl],
        fake: Callable[..., Any],
        gradient: Callable[..., Mapping[str, Tensor | None]] | None,
        setup_context: Callable[..., None] | None,
        carried: Sequence[Carried],
    ) -> None:
        self.name, self.impls = schema.partition("(")[0], impls
        self.gradient, self.setup_context = gradient, setup_context
        inside, returns = schema.removeprefix(f"{self.name}(").rsplit(") -> ", 1)
        by_type = {kind.cls.__name__: kind for kind in carried}
        self.kinds: list[Carried | None] = []
        names, types, flat = [], [], []
        self.names: list[str | None] = []  # of flat arguments; None inside carried objects, which get no gradient
        for type_, name in (argument.split() for argument in inside.split(",")):
            kind = by_type.get(type_)
            self.kinds.append(kind)
            names.append(name)
            types.append(type_)
            flat.append(f"{type_} {name}" if kind is None else kind.schema)
            self.names += [name] if kind is None else [None] * kind.size
        self.form = make_form(self.name, types, self.kinds)
        self.inputs: Callable[..., Any] = namedtuple(f"{self.name}_inputs", names)  # type: ignore[misc]
        self.is_flat = not any(self.kinds)
        self.held = [(i, kind.tensors) for i, kind in enumerate(self.kinds) if kind is not None and kind.tensors]
        _carried.update((kind.cls, kind) for kind in carried)

        qualified = f"{NAMESPACE}::{self.name}"
        text = f"{self.name}({', '.join([*flat, 'str source'])}) -> {returns}"
        _library.define(text, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._compute, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, lambda *args: fake(*self.unflatten(args)), lib=_library)
        torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, self._decompose, lib=_library)
        if gradient is not None:
            setup = None if setup_context is None else self._setup
            torch.library.register_autograd(qualified, self._backward, setup_context=setup, lib=_library)
        self.op = getattr(torch.ops.gs_kernels, self.name).default
        self.differentiable = self.op if gradient is None or setup_context is None else _function(self)

    def __call__(self, *args: Any) -> Any:
        tensors = self._tensors(args)
        eager = is_eager(*tensors)
        if eager and wants_tangents() and self.gradient is not None:
            self._refuse_tangents(tensors)
        if not eager or transform_of() is not None:
            return self.op(*self.flatten(args), SOURCE)
        for t in tensors:
            if t.requires_grad:
                run = self.differentiable if torch.is_grad_enabled() else self._compute
                return run(*self.flatten(args), SOURCE)
        return self._run(args) if device.on_gpu(args[0]) else choose(self.name, self.impls, *args).run(*args)

    def repeat(self, *args: Any) -> Any:
        """Does what a call would, if it is eager, on a GPU, needs no gradient, and one of its form was bound before.

        The arguments need no checks: those of that call were right. Returns None where there was none.
        """
        x = args[0]
        # in this order: a CPU is asked least, and a compiler cannot trace the second question
        if torch.compiler.is_compiling() or type(x) not in PLAIN or not device.on_gpu(x):
            return None
        if not is_plain_call(x) or not launches_directly():
            return None
        try:
            key, tensors = self.form(*args)
            call = bound_calls.find(key)
        except (TypeError, AttributeError):  # arguments of kinds that no call can have
            return None
        if call is None:
            return None
        if torch.is_grad_enabled():
            for t in tensors:
                if t.requires_grad:
                    return None
        return call(tensors)

    def _run(self, args: Sequence[Any]) -> Any:
        """Runs an implementation; on a GPU, launches what a call of the same form did."""
        x = args[0]
        if not device.on_gpu(x) or not launches_directly() or not is_eager(*self._tensors(args)):
            return choose(self.name, self.impls, *args).run(*args)
        key, tensors = self.form(*args)
        call = bound_calls.find(key)
        if call is not None:
            return call(tensors)
        return bound_calls.record(key, tensors, lambda: choose(self.name, self.impls, *args).run(*args))

    def _tensors(self, args: Sequence[Any]) -> list[Tensor]:
        tensors = []
        for a in args:
            if isinstance(a, Tensor):
                tensors.append(a)
        for place, parts in self.held:
            for part in parts:
                if isinstance(t := getattr(args[place], part), Tensor):
                    tensors.append(t)
        return tensors

    def _refuse_tangents(self, tensors: Sequence[Tensor]) -> None:
        """Raises if a forward-mode derivative is wanted: torch takes it for 0 where there is no formula."""
        if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                f"{self.name}: no forward-mode derivative (jvp); use backward or torch.autograd.grad"
            )

    def flatten(self, args: Sequence[Any]) -> Sequence[Any]:
        """Returns the arguments as the schema has them, without the source."""
        if self.is_flat:
            return args
        flat: list[Any] = []
        for a, kind in zip(args, self.kinds, strict=True):
            flat += (a,) if kind is None else kind.flatten(a)
        return flat

    def unflatten(self, flat: Sequence[Any]) -> Sequence[Any]:
        """Makes the arguments of implementations from those of the schema; a source behind them is dropped."""
        if self.is_flat:
            return flat[: len(self.kinds)]
        rest = iter(flat)
        return [next(rest) if kind is None else kind.unflatten(*islice(rest, kind.size)) for kind in self.kinds]

    def _compute(self, *flat: Any) -> Any:
        """Runs an implementation, which never sees a gradient."""
        return self._run(self.unflatten([a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in flat]))

    def _decompose(self, mode: Any, op: Any, types: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
        if keeps_triton_ops():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return self._compute(*args)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self.setup_context is not None
        self.setup_context(ctx, self.inputs(*self.unflatten(inputs)), output)

    def _backward(self, ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
        assert self.gradient is not None
        wanted = {name for name, needed in zip(self.names, ctx.needs_input_grad, strict=False) if needed}
        grads = self.gradient(ctx, wanted, *dys)
        return *[None if name is None else grads.get(name) for name in self.names], None


def register(
    schema: str,
    impls: Sequence[Impl],
    fake: Callable[..., Any],
    gradient: Callable[..., Mapping[str, Tensor | None]] | None = None,
    setup_context: Callable[..., None] | None = None,
    carried: Sequence[Carried] = (),
) -> Op:
    """Defines `gs_kernels::<schema>`, with a last argument `str source` behind those given.

    Args:
        schema: as torch writes it, but that an argument may have the name of a carried class as its type.
        fake: takes the arguments of implementations, and says what the results look like.
        gradient: `(ctx, wanted, *dys)` gives the gradients by the names of arguments; wanted are the names of those
            that need one. What is not given has none.
        setup_context: `(ctx, inputs, output)` keeps what `gradient` needs, best by `save`; inputs has the arguments of
            implementations by name.
        carried: the classes that the schema names.

    Returns:
        what functions call, with the arguments of implementations.
    """
    op = Op(schema, impls, fake, gradient, setup_context, carried)
    OPS[op.name] = op
    return op


def save(ctx: Any, **values: Any) -> None:
    """Keeps values for the backward pass: tensors, also those of carried objects, where autograd guards them."""
    ctx.kinds = [_carried.get(type(value)) for value in values.values()]
    flat: list[Any] = []
    for value, kind in zip(values.values(), ctx.kinds, strict=True):
        flat += (value,) if kind is None else kind.flatten(value)
    ctx.save_for_backward(*[v if isinstance(v, Tensor) else None for v in flat])
    ctx.rest = [None if isinstance(v, Tensor) else v for v in flat]


def saved(ctx: Any) -> list[Any]:
    """Gives back what `save` kept, in its order."""
    flat = iter([rest if t is None else t for t, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)])
    return [next(flat) if kind is None else kind.unflatten(*islice(flat, kind.size)) for kind in ctx.kinds]


def _no_view(output: Any) -> Any:
    """Returns the same memory, but no view: autograd refuses to change a view in place behind a Function."""
    return output.detach() if isinstance(output, Tensor) and is_view(output) else output


def _function(op: Op) -> Callable[..., Any]:
    """Makes the op with its gradient for eager mode: that saves 30 to 50 us a call on the way through torch."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = op._compute(*args)
            output = _no_view(output) if isinstance(output, Tensor) else tree_map(_no_view, output)  # a slow function
            op._setup(ctx, args, output)
            return output

        backward = staticmethod(op._backward)

    return Function.apply
