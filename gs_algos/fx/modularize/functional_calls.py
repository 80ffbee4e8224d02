"""Gives functional calls (`F.conv2d(x, self.w)`, `F.linear(x, self.w)`) modules, so that algorithms can replace them.

Each module with such calls is traced by torch.fx and comes back as a GraphModule at its old place. The inserted layers
share the Parameter objects, which stay registered where they were: optimizers and state_dict keys do not change.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gs_algos.core.modules import TRACING, get_module, set_module
from gs_algos.core.nested_tensors import tensors_of
from gs_algos.core.untouched import untouched
from gs_algos.fx.capture.call_recorder import Call, first_calls
from gs_algos.fx.capture.capture import capture, unwrap
from gs_algos.fx.capture.tracers import OwnThreadTracer, fixed_arguments
from gs_algos.fx.graph import Node, SiteGraph
from gs_algos.fx.modularize.matrix_products import CONVS, products, unflipped
from gs_algos.fx.modularize.shared_parameters import Borrowed, BorrowedLinear, borrow
from gs_kernels.runtime.torch_private import tree_map

logger = logging.getLogger(__name__)

_SHAPES = ("view", "reshape")  # between the input of a module, its layer and its output


class _Training(nn.Module):
    """Returns its own training flag as a value, so that a trace keeps `F.dropout(x, training=self.training)` alive."""

    def forward(self) -> bool:
        return self.training


class Modularized(torch.fx.GraphModule):
    """Keeps all that the module had which was traced: parameters in order, unused children, hooks, attributes.

    fixed: the arguments of forward that are no tensors, and the values for which the trace holds.
    """

    def __init__(
        self, original: nn.Module, graph: torch.fx.Graph, extra: dict[str, nn.Module], fixed: dict[str, Any]
    ) -> None:
        super().__init__(nn.Module(), torch.fx.Graph())
        taken = {
            key: copy.copy(value) if isinstance(value, dict) else value for key, value in original.__dict__.items()
        }
        self.__dict__.update(taken)
        self.fixed = fixed
        self._modules.update(extra)
        for layer in extra.values():
            layer.train(original.training)
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Modularized:
        """Copies children that the graph does not use too, which GraphModule's own copy drops."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        torch.fx.GraphModule.__init__(new, nn.Module(), torch.fx.Graph())
        state = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code")}
        new.__dict__.update(copy.deepcopy(state, memo))
        new.graph = copy.deepcopy(self.graph)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles nodes and state: GraphModule's own pickle traces anew, and drops what the graph does not use."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code")}
        return _unfilled, (), {"nodes": _flat(self.graph), "state": state}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        torch.fx.GraphModule.__init__(self, nn.Module(), torch.fx.Graph())
        self.__dict__.update(saved["state"])
        self.graph = _graph(saved["nodes"])


@dataclass(frozen=True)
class _Output:
    """Stands for the output of a node, by the node's name, in the arguments of another."""

    node: str


def _unfilled() -> Modularized:
    return Modularized.__new__(Modularized)


def _flat(graph: torch.fx.Graph) -> list[tuple[Any, ...]]:
    """Returns the nodes of a graph as plain values: operation, target, arguments, name."""

    def plain(arguments: Any) -> Any:
        return torch.fx.node.map_arg(arguments, lambda node: _Output(node.name))  # type: ignore[arg-type, return-value]

    return [(node.op, node.target, plain(node.args), plain(node.kwargs), node.name) for node in graph.nodes]


def _graph(nodes: Sequence[tuple[Any, ...]]) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    made: dict[str, torch.fx.Node] = {}

    def linked(arguments: Any) -> Any:
        return torch.fx.node.map_aggregate(arguments, lambda a: made[a.node] if isinstance(a, _Output) else a)  # type: ignore[arg-type]

    for op, target, args, kwargs, name in nodes:
        made[name] = graph.create_node(op, target, linked(args), linked(kwargs), name)
    return graph


class _LeafTracer(OwnThreadTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def modularize(model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """Puts a layer in place of each functional conv and linear on a parameter, and returns the model.

    The result computes the same in training and in eval mode, with the same Parameter objects under the same state_dict
    keys; it is checked on the example inputs. It is the model itself unless the root makes such calls: then it is a
    GraphModule, without the methods of the user's class. A module that cannot be traced (control flow that depends on
    data or on the mode) stays as it is, and the reason is logged as a warning.

    Raises:
        ValueError: if the example inputs do not run through the model.
    """
    new, failures = try_modularize(model, example_inputs, example_kwargs)
    for failure in failures:
        logger.warning("modularize: %s", failure)
    return new


def try_modularize(
    model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None = None
) -> tuple[nn.Module, list[str]]:
    """Does what `modularize` does, and returns a sentence for each module that stays functional."""
    with TRACING:
        return _modularize(model, example_inputs, example_kwargs)


def _modularize(
    model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None
) -> tuple[nn.Module, list[str]]:
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    failures: list[str] = []
    root, prefix = unwrap(model)
    scopes = functional_scopes(capture(model, args, kwargs), model)
    with untouched(model):
        calls = first_calls({scope: get_module(model, scope) for scope in scopes - {prefix}}, root, args, kwargs)
    calls[prefix] = Call(root, args, kwargs)
    for scope in sorted(scopes, key=_depth, reverse=True):  # inner modules first
        module = get_module(model, scope)
        try:
            if scope not in calls:
                raise ValueError("it is not called as a module")
            whole = _rewritten(module, fixed_arguments(module, calls[scope].args, calls[scope].kwargs))
            new: nn.Module = (_layer_alone(module, whole) if scope else None) or whole
            _compare(module, new, calls[scope])
        except Exception as error:  # noqa: BLE001  a tracer may raise anything; what it says is the reason
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failures.append(f"{scope or type(module).__name__} stays functional: {lines[0]}")
            continue
        if scope == "":
            return new, failures
        set_module(model, scope, new)
    return model, failures


def functional_scopes(graph: SiteGraph, model: nn.Module) -> set[str]:
    """Finds the user's modules that multiply by a parameter with a function; layers that do more, too."""
    scopes = {node.scope for node in graph.nodes if node.module is None and (_is_call(node) or graph.multiplies(node))}
    return {scope for scope in scopes if not type(get_module(model, scope)).__module__.startswith("torch.nn.")}


def _is_call(node: Node) -> bool:
    return node.weight is not None and node.op in (*CONVS, "linear")


def modularized(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Lists (qualified name, fixed arguments) of every module that `modularize` made, for `modularize_again`."""
    made = ((name, module) for name, module in model.named_modules() if isinstance(module, (Modularized, Borrowed)))
    return [(name, module.__dict__["fixed"]) for name, module in made if "fixed" in module.__dict__]


def modularize_again(model: nn.Module, done: Sequence[tuple[str, dict[str, Any]]]) -> nn.Module:
    """Does to a freshly built model what `modularize` did to one of its kind, without inputs to run."""
    for scope, fixed in sorted(done, key=lambda item: _depth(item[0]), reverse=True):
        with TRACING:
            module = get_module(model, scope)
            new = _rewritten(module, fixed)
        if scope == "":
            return new
        set_module(model, scope, _layer_alone(module, new) or new)
    return model


def release(model: nn.Module, layer: nn.Module, keys: Sequence[str] = ("weight", "bias")) -> None:
    """Takes the parameters that a layer has borrowed away from their owners, once the layer has been replaced."""
    lent = [layer._parameters.get(key) for key in getattr(layer, "borrowed", ()) if key in keys]
    for owner in model.modules():
        for key, parameter in owner._parameters.items():
            if owner is not layer and parameter is not None and any(parameter is p for p in lent):
                owner._parameters[key] = None


def _depth(scope: str) -> int:
    return scope.count(".") + bool(scope)


def _rewritten(module: nn.Module, fixed: dict[str, Any]) -> Modularized:
    """Makes a GraphModule that computes what `module` does, its functional calls replaced; `module` is not touched.

    Raises:
        ValueError: if there is nothing to replace, or the two modes differ by more than flags.
    """
    graphs = []
    for training in (False, True):
        with untouched(module, training):
            graphs.append(_LeafTracer().trace(module, concrete_args=fixed))
    graph = graphs[0]
    extra: dict[str, nn.Module] = {}
    _follow_mode(graph, graphs[1], extra)
    _insert_layers(module, graph, extra)
    if not any(isinstance(layer, Borrowed) for layer in extra.values()):
        raise ValueError("none of its functional calls has a parameter as weight and constants as arguments")
    for node in graph.nodes:
        node.type = None  # an annotation that was read as text cannot be pickled
        if node.op == "placeholder" and node.target.removesuffix("_1") in fixed:
            node.target = node.target.removesuffix("_1")  # torch.fx renames an argument whose value it fixes
    return Modularized(module, graph, extra, fixed)


def _layer_alone(module: nn.Module, new: Modularized) -> Borrowed | None:
    """Returns the one layer that a rewritten module consists of, to stand in its place under its own name.

    So are Transformers' Conv1D and FalconLinear, but for reshaping. None if there is more to the module.
    """
    layers = list(new._modules.values())
    one = len(layers) == 1 and isinstance(layers[0], Borrowed) and isinstance(layers[0], nn.Linear)
    if not one or module._modules or module._buffers or len(inspect.signature(module.forward).parameters) != 1:
        return None
    layer: Any = layers[0]
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    if own.keys() != {key for key, parameter in layer._parameters.items() if parameter is not None}:
        return None
    call = next(node for node in new.graph.nodes if node.op == "call_module")
    source, result = call.args[0], next(node for node in new.graph.nodes if node.op == "output").args[0]
    if _reshaped(source).op != "placeholder" or _reshaped(result) is not call:
        return None
    if any(own[key] is not layer._parameters[key] for key in own):
        return None
    layer.__dict__.update({key: value for key, value in module.__dict__.items() if key not in layer.__dict__})
    layer.borrowed, layer.fixed = (), new.fixed
    return layer


def multiplies_alone(layer: nn.Module) -> bool:
    """Says whether a layer with a forward of its own computes `x @ weight^T + bias` and nothing else, by its trace."""
    if "forward" in layer.__dict__:
        return False
    try:
        with TRACING:
            alone = _layer_alone(layer, _rewritten(layer, {}))
    except Exception:  # noqa: BLE001  a tracer may raise anything: such a layer computes something else
        return False
    return isinstance(alone, BorrowedLinear)


def _reshaped(node: Any) -> torch.fx.Node:
    """Returns the node whose output is reshaped to what `node` gives."""
    while node.op == "call_method" and node.target in _SHAPES:
        node = node.args[0]
    return node


def _follow_mode(graph: torch.fx.Graph, trained: torch.fx.Graph, extra: dict[str, nn.Module]) -> None:
    """Makes flags that are False in eval mode and True in training follow the module's mode."""
    split = ValueError("its forward takes another path in training than in eval mode")
    if len(graph.nodes) != len(trained.nodes):
        raise split
    partner = dict(zip(graph.nodes, trained.nodes, strict=True))
    flags: list[torch.fx.Node] = []

    def merge(value: Any, other: Any) -> Any:
        if isinstance(value, torch.fx.Node) and partner[value] is other:
            return value
        if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)) and len(value) == len(other):
            return [merge(a, b) for a, b in zip(value, other, strict=True)]
        if isinstance(value, dict) and isinstance(other, dict) and list(value) == list(other):
            return {key: merge(value[key], other[key]) for key in value}
        if isinstance(value, slice) and isinstance(other, slice):
            return slice(*merge((value.start, value.stop, value.step), (other.start, other.stop, other.step)))
        if value is False and other is True:
            if not flags:
                with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
                    flags.append(graph.call_module(_unused(extra, "training_flag")))
            extra[str(flags[0].target)] = _Training()
            return flags[0]
        if type(value) is not type(other) or value != other:
            raise split
        return value

    for node, twin in partner.items():
        if (node.op, node.target) != (twin.op, twin.target):
            raise split
        node.args, node.kwargs = tuple(merge(node.args, twin.args)), merge(dict(node.kwargs), dict(twin.kwargs))


def _insert_layers(module: nn.Module, graph: torch.fx.Graph, extra: dict[str, nn.Module]) -> None:
    names: dict[Any, str] = {}
    layer_of: dict[torch.fx.Node, torch.fx.Node] = {}  # a product may multiply what an earlier one gave
    for product in list(products(module, graph)):
        key = (product.op, id(product.weight), id(product.bias), repr(product.geometry))
        if key not in names:
            names[key] = _unused({**module.__dict__, **module._modules, **extra}, f"{product.name}_{product.op}")
            extra[names[key]] = borrow(product.op, product.weight, product.bias, product.geometry)
        with graph.inserting_before(product.nodes[0]):
            called = graph.call_module(names[key], (layer_of.get(product.x, product.x),))
        product.nodes[0].replace_all_uses_with(called)
        layer_of[product.nodes[0]] = called
        for node in product.nodes:
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):  # what only the replaced calls read
        if not node.users and (node.op == "get_attr" or unflipped(node) is not None):
            graph.erase_node(node)


def _unused(taken: dict[str, Any], name: str) -> str:
    while name in taken:
        name += "_"
    return name


def _compare(module: nn.Module, new: nn.Module, call: Call) -> None:
    """Raises ValueError if the two give other outputs in either mode, with the same random numbers."""
    for training in (False, True):
        outputs = []
        for each in (module, new):
            with untouched(module, training), untouched(new, training):
                args, kwargs = tree_map(_clone, (call.args, call.kwargs))
                outputs.append(list(tensors_of(each(*args, **kwargs))))
        before, after = outputs
        if len(before) != len(after) or not all(map(_close, before, after)):
            raise ValueError(f"its trace gives other outputs in {'training' if training else 'eval'} mode")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Says whether two outputs differ by no more than the order of sums makes them, relative to the largest value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    tolerance = max(1e-5, 4 * torch.finfo(a.dtype).eps)
    a, b = a.detach().double(), b.detach().double()
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6 + tolerance * size, equal_nan=True)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
