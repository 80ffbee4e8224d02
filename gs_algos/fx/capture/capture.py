"""Captures a model as a site graph with the first of several tracers that can read it; the model is not touched.

Tracers, best first: torch.export; torch.fx.symbolic_trace; each child on its own; which leaf modules ran in what order.
What a tracer cannot read becomes a note in the graph, never an exception.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from gs_algos.core.algorithm import InputsError, describe_error, hint
from gs_algos.core.modules import TRACING
from gs_algos.core.network import wrapped_at
from gs_algos.core.untouched import untouched
from gs_algos.fx import op_names
from gs_algos.fx.capture.call_recorder import Call, copied, leaf_draft, record
from gs_algos.fx.capture.graph_reader import ModuleNames, NodeDraft
from gs_algos.fx.capture.node_builder import assemble, concatenate
from gs_algos.fx.capture.tracers import by_export, by_symbolic_trace
from gs_algos.fx.graph import SiteGraph

logger = logging.getLogger(__name__)

Trace = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], ModuleNames], list[NodeDraft]]
_TRACERS: tuple[tuple[str, Trace], ...] = (("export", by_export), ("symbolic_trace", by_symbolic_trace))


def capture(model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None = None) -> SiteGraph:
    """Reads the graph of `model(*example_inputs, **example_kwargs)` in eval mode, with names of live modules.

    The user's hooks run as in a forward pass. Training flags, attributes, buffers and random state are put back. One
    thread at a time captures; the others wait.

    Args:
        model: any module; DataParallel, DistributedDataParallel and torch.compile wrappers are looked into.
        example_inputs: tuple or list of positional inputs, or the one input itself.
        example_kwargs: keyword inputs.

    Raises:
        ValueError: if the example inputs do not run through the model, or a lazy module has no weights yet.
        TypeError: if the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a nn.Module, got {type(model).__name__}")
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    lazy = [name for name, module in model.named_modules() if _is_lazy(module)]
    if lazy:
        raise InputsError(
            "capture", f"every module must have its weights, got lazy {lazy[0]!r}; run one forward pass first"
        )
    root, prefix = unwrap(model)
    names = ModuleNames(model, prefix)
    notes: list[str] = []
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers warn of their own deprecations
        tracer, drafts = _first_that_works(root, args, kwargs, names, notes)
    graph = SiteGraph(tracer, assemble(drafts, names), tuple(notes))
    logger.info("graph of %s read by %s, %d nodes", type(root).__name__, tracer, len(graph.nodes))
    return graph


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """Returns the user's own module inside parallel and compile wrappers, and its qualified name in `model`."""
    root, prefix = model, ""
    while (key := wrapped_at(root)) is not None:
        root = root.get_submodule(key)
        prefix = f"{prefix}.{key}" if prefix else key
    return root, prefix


def _first_that_works(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: ModuleNames, notes: list[str]
) -> tuple[str, list[NodeDraft]]:
    """Tries each tracer in turn, and returns the name of the first that works, with its drafts."""
    walked: list[NodeDraft] | None = None
    for tracer, trace in _TRACERS:
        drafts = _attempt(tracer, trace, (root, args, kwargs, names), notes)
        if drafts is not None:
            return tracer, drafts
        if walked is None:  # the first failure may be the inputs' fault, which only running them can tell
            walked = _walk(root, args, kwargs, names)
    traced, drafts = _by_children(root, args, kwargs, names, notes)
    if traced:
        return "children", drafts
    notes.append("children: no child could be traced, so no edges are known")
    return "walk", walked or []


def _attempt(tracer: str, trace: Trace, given: tuple[Any, ...], notes: list[str]) -> list[NodeDraft] | None:
    root, args, kwargs, names = given
    try:
        with untouched(names.model):
            args, kwargs = copied((args, kwargs), names.model)
            return trace(root, args, kwargs, names)
    except Exception as error:  # a tracer may raise anything; what it says becomes a note
        notes.append(f"{tracer}: {describe_error(error)}")
        logger.debug("%s failed", tracer, exc_info=True)
        return None


def _walk(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: ModuleNames) -> list[NodeDraft]:
    """Runs the model and lists its leaf calls.

    Raises:
        ValueError: if the model itself fails on these inputs.
    """
    try:
        with untouched(names.model):
            calls = record(root, args, kwargs, names, lambda module: op_names.is_plain(module) or not module._modules)
    except Exception as error:
        raise InputsError(
            "capture",
            f"example_inputs must run through the model, got {describe_error(error)}"
            f"{hint(args if len(args) > 1 else args[0] if args else args, error)}",
        ) from error
    return [leaf_draft(item.module, names) if isinstance(item, Call) else item for item in calls]


def _by_children(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: ModuleNames, notes: list[str]
) -> tuple[bool, list[NodeDraft]]:
    """Traces each outermost module that runs inside `module`, going down where that fails; True if any was traced.

    A child called twice gives its nodes twice, so that nothing in it counts as called once.
    """
    with untouched(names.model):
        calls = record(module, args, kwargs, names, lambda _: True)
    traced = False
    drafts_of: dict[int, list[NodeDraft]] = {}
    parts: list[list[NodeDraft]] = []
    for item in calls:
        if isinstance(item, NodeDraft):
            parts.append([item])
            continue
        child = item.module
        if id(child) not in drafts_of:
            drafts_of[id(child)], deep = _by_child(item, names, notes)
            traced = traced or deep
        parts.append(copy.deepcopy(drafts_of[id(child)]))
    return traced, concatenate(parts)


def _by_child(call: Call, names: ModuleNames, notes: list[str]) -> tuple[list[NodeDraft], bool]:
    child = call.module
    if op_names.is_plain(child) or not child._modules:
        return [leaf_draft(child, names)], False
    inner = copy.copy(names)
    inner.prefix = names.modules[id(child)]
    for tracer, trace in _TRACERS:
        drafts = _attempt(f"{inner.prefix}: {tracer}", trace, (child, call.args, call.kwargs, inner), notes)
        if drafts is not None:
            return drafts, True
    try:
        deep, drafts = _by_children(child, call.args, call.kwargs, inner, notes)
    except Exception as error:  # noqa: BLE001  alone, a module may do anything; it is read as one operation then
        notes.append(f"{inner.prefix}: children: {describe_error(error)}")
        return [leaf_draft(child, names)], False
    return drafts, deep


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()
