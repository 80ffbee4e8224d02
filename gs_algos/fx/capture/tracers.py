"""Traces a module by torch.export (non-strict) or torch.fx.symbolic_trace, and returns drafts of nodes."""

from __future__ import annotations

import inspect
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn

from gs_algos.core.nested_tensors import tensors_of
from gs_algos.fx import op_names
from gs_algos.fx.capture.graph_reader import Constant, FxGraphReader, ModuleNames, NodeDraft
from gs_kernels.runtime.torch_private import tree_map

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def by_export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: ModuleNames) -> list[NodeDraft]:
    """Traces `module(*args, **kwargs)` by torch.export; raises whatever the tracer raises."""
    flat = _FlatOutput(module)
    # torch.export prints the half-made graph to stderr when it fails; the reason is kept as a note instead
    with _visible_pass_through(module), redirect_stderr(io.StringIO()):
        program = torch.export.export(flat, args, kwargs, strict=False)
    signature = program.graph_signature
    constants = {
        spec.arg.name: Constant()
        for spec in signature.input_specs
        if spec.kind is not torch.export.graph_signature.InputKind.USER_INPUT
    }
    for placeholder, path in signature.inputs_to_parameters.items():
        constants[placeholder] = Constant(names.parameter(path.removeprefix("traced.")))
    return FxGraphReader(names, strip="traced").read(program.graph_module.graph, program.graph_module, constants)


def by_symbolic_trace(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: ModuleNames
) -> list[NodeDraft]:
    """Traces a module by torch.fx; arguments that are not tensors are fixed at their example values.

    Tries first to look into modules that have their own forward, then to treat every known layer as a leaf.
    """
    fixed = fixed_arguments(module, args, kwargs)
    try:
        graph = _trace(module, _Tracer(), fixed)
    except Exception:  # noqa: BLE001  a tracer may raise anything; the second attempt's error is the one that is told
        graph = _trace(module, _CoarseTracer(), fixed)
    _find_shapes(graph, module, args, kwargs)
    return FxGraphReader(names).read(graph, module, {})


def fixed_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call that are no tensors, defaults too: a trace holds for these values only."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {
        name: value
        for name, value in bound.arguments.items()
        if signature.parameters[name].kind not in VARIADIC
        and (value is None or isinstance(value, (bool, int, float, str)))
    }


def _find_shapes(graph: torch.fx.Graph, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs the graph on copies of the inputs, so that each node knows its output's shape; raises if it cannot run."""
    signature = inspect.signature(module.forward)
    if any(p.kind in VARIADIC for p in signature.parameters.values()):
        return
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, bound.arguments)
    _Shapes(torch.fx.GraphModule(module, graph)).run(*values.values())


class _Shapes(torch.fx.Interpreter):
    """Runs a graph and stores the output of each node in `meta["val"]`, as a tensor without data."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["val"] = value.detach().to("meta")
        return value


def _trace(module: nn.Module, tracer: torch.fx.Tracer, fixed: dict[str, Any]) -> torch.fx.Graph:
    with _visible_pass_through(module):
        return tracer.trace(module, concrete_args=fixed)


class _FlatOutput(nn.Module):
    """Runs a module and returns the tensors of its output as a tuple, whatever classes they came in."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_of(self.traced(*args, **kwargs)))


class OwnThreadTracer(torch.fx.Tracer):
    """Lets modules that another thread calls meanwhile run as if nothing was traced: torch.fx patches them for all."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> torch.fx.Graph:
        self._thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _Tracer(OwnThreadTracer):
    """Treats as leaves: layers whose class says all, and modules with neither children nor parameters (a DropPath)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if op_names.is_container(m):
            return False
        return op_names.is_plain(m) or type(m).__module__.startswith("torch.nn.") or not (m._modules or m._parameters)


class _CoarseTracer(_Tracer):
    """Treats every module without children, and every subclass of a known layer, as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = op_names.op_of_module(m) != "other" or not m._modules
        return super().is_leaf_module(m, module_qualified_name) or (known and not op_names.is_container(m))


@contextmanager
def _visible_pass_through(module: nn.Module) -> Iterator[None]:
    """Makes a module that returns its own input in eval mode (stochastic depth) appear in the graph, as an alias."""

    def mark(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return torch.ops.aten.alias(output) if args and output is args[0] else None

    handles = [
        child.register_forward_hook(mark)
        for child in module.modules()
        if child is not module
        and op_names.is_hookable(child)
        and not (op_names.is_plain(child) or op_names.is_container(child))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
