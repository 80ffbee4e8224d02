"""Runs a model once and follows its channels through every operation that PyTorch really performs.

A dispatch mode sees the ATen operations of the forward pass, whatever Python made them (a function, a shared module, a
loop). Each has a rule (op_rules.py) that says where the labels of its inputs go. An operation without a
rule freezes the channels it reads, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.modules import canonical_names, parameter_owners
from gs_algos.core.nested_tensors import tensors_of
from gs_algos.core.untouched import untouched
from gs_algos.pruning.channel_groups.labels import Atoms, Value
from gs_kernels.runtime.torch_private import TorchDispatchMode, tree_leaves

OpRule = Callable[["ChannelFlow", "OpCall"], list[Value]]


@dataclass(frozen=True)
class OpCall:
    """Holds one ATen operation: its arguments and what it returned."""

    op: str  # e.g. "add", without overload and without the underscore of an in-place form
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def argument(self, name: str, default: Any = None) -> Any:
        """Returns an argument by the name it has in the operation's schema."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                given = self.args[i] if i < len(self.args) else self.kwargs.get(name, argument.default_value)
                return default if given is None else given
        return default

    def written(self) -> list[Tensor]:
        """Returns the tensors among its arguments that the operation changes in place."""
        changed: list[Tensor] = []
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                changed += [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        return changed


@dataclass(frozen=True)
class ReshapedChannels:
    """Holds labels along several dimensions of one tensor: what a cut leaves of them must be a box again.

    labels: of rank >= 2; scope: qualified name of the module whose code reshaped the tensor.
    """

    labels: Tensor
    scope: str


@dataclass(frozen=True)
class Cost:
    """Counts the multiply-adds of an operation, which shrink with the share that stays of each factor, labels `[n]`."""

    macs: int
    factors: tuple[Tensor, ...]


@dataclass
class ChannelFlow:
    """Collects what one or more forward passes show of a model's channels."""

    model: nn.Module
    atoms: Atoms = field(default_factory=Atoms)
    produced: list[Tensor] = field(default_factory=list)  # labels of output channels of layers
    norms: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # labels that a batch norm reads, and its weight's
    heads: list[Tensor] = field(default_factory=list)  # labels that come through a softmax along another dimension
    boxes: list[ReshapedChannels] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)  # ids of parameters that an operation read
    scope: str = ""
    seen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def __post_init__(self) -> None:
        self.names = {key: names[0] for key, names in parameter_owners(self.model).items()}
        for name, buffer in self.model.named_buffers():
            self.names.setdefault(id(buffer), name)

    def value(self, tensor: Any) -> Value:
        """Returns the labels of a tensor; those of a parameter or buffer are its own atoms."""
        if not isinstance(tensor, Tensor):
            return Value(())
        value = self.seen.get(tensor)
        if value is not None:
            return value
        shape = tuple(tensor.shape)
        name = self.names.get(id(tensor))
        if name is None:
            return Value(shape)
        self.ran.add(id(tensor))
        fields = []
        for d, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[d] = size
                fields.append(self.atoms.axis(name, d, size).atoms().view(view))
        value = Value(shape, tuple(fields), weights=True)
        if type(tensor) not in (Tensor, nn.Parameter):  # sharded or quantized: nothing that can be sliced
            for labels in fields:
                self.atoms.freeze(labels, f"{name} is a {type(tensor).__name__}")
        self.seen[tensor] = value
        return value

    def where(self, call: OpCall) -> str:
        return f"{call.op} in {self.scope}" if self.scope else call.op


def trace_flow(
    flow: ChannelFlow,
    inputs: Inputs,
    training: bool,
    rules: Callable[[OpCall], OpRule | None],
    before: Callable[[ChannelFlow, OpCall], None],
) -> None:
    """Adds one forward pass to the flow. The model is as it was afterwards.

    Args:
        rules: gives the rule of an operation.
        before: is called with every operation, before its rule.

    Raises:
        ValueError: if the inputs do not run through the model.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path is one opaque operation
    try:
        with untouched(flow.model, training), _scopes(flow), _FlowTracer(flow, rules, before):
            outputs = run(flow.model, inputs, "prune")
        for tensor in answers_of(outputs):
            for labels in flow.value(tensor).fields:
                flow.atoms.freeze(labels, "is an output of the network")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        flow.seen.clear()


def answers_of(outputs: Any) -> Iterator[Tensor]:
    """Yields the tensors of a network's outputs, but those of a key-value cache, which it alone reads again."""
    held = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else ()
    return tensors_of(outputs, {id(value) for value in held if hasattr(value, "get_seq_length")})


class _FlowTracer(TorchDispatchMode):
    def __init__(
        self, flow: ChannelFlow, rules: Callable[[OpCall], OpRule | None], before: Callable[[ChannelFlow, OpCall], None]
    ) -> None:
        super().__init__()
        self.flow, self.rules, self.before = flow, rules, before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(returned) if isinstance(t, Tensor)]
        space, _, name = func._schema.name.partition("::")
        op = name if space == "aten" else f"{space}::{name}"
        call = OpCall(op.rstrip("_"), func, args, kwargs, outputs)
        self.before(self.flow, call)
        given = [self.flow.value(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(value.fields for value in given):
            return returned
        rule = self.rules(call)
        if rule is None:
            for value in given:
                for labels in value.fields:
                    self.flow.atoms.freeze(labels, f"no rule for the operation {self.flow.where(call)}")
            return returned
        for tensor, value in zip(outputs, rule(self.flow, call), strict=False):
            self.flow.seen[tensor] = value
        return returned


@contextmanager
def _scopes(flow: ChannelFlow) -> Iterator[None]:
    """Keeps `flow.scope` at the innermost module that is running."""
    names, stack = canonical_names(flow.model), [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))
        flow.scope = stack[-1]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        flow.scope = stack[-1]

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        flow.scope = ""
