"""Finds the calls in a torch.fx graph that multiply an activation by a parameter, and that parameter."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CONVS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__")
_ADDMMS = (torch.addmm, "addmm")
_ADDS = (torch.add, operator.add, operator.iadd, "add", "add_")
_FLIPS = ("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute")


@dataclass(frozen=True)
class Product:
    """Describes one call: `y = x @ weight^T + bias`, a convolution, or with `turned` `y = x @ weight + bias`.

    Args:
        op: "linear", "matmul" (turned), "conv1d", "conv2d" or "conv3d".
        weight, bias: the parameters.
        name: of the weight in the graph.
        geometry: stride, padding, dilation and groups of a conv, as given to the function.
        nodes: what gives y, and what only that reads.
    """

    op: str
    x: torch.fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    name: str
    geometry: dict[str, Any]
    nodes: tuple[torch.fx.Node, ...]


def products(module: nn.Module, graph: torch.fx.Graph) -> Iterator[Product]:
    """Yields every conv, linear and matrix product of a tensor with a parameter in the graph of a module."""
    for node in graph.nodes:
        product = _conv(module, node) or _linear(module, node)
        if product is not None:
            yield product


def _conv(module: nn.Module, node: torch.fx.Node) -> Product | None:
    op = next((op for op, function in CONVS.items() if node.op == "call_function" and node.target is function), None)
    if op is None:
        return None
    given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    x, geometry = given.pop("input", None), {k: v for k, v in given.items() if k not in ("weight", "bias")}
    weight, bias = parameter_at(module, given.get("weight")), parameter_at(module, given.get("bias"))
    constant = not any(isinstance(leaf, torch.fx.Node) for leaf in geometry.values())
    if weight is None or (given.get("bias") is not None and bias is None) or not constant or weight.dim() < 2:
        return None
    if not isinstance(x, torch.fx.Node):
        return None
    geometry = {k: tuple(v) if isinstance(v, list) else v for k, v in geometry.items()}
    return Product(op, x, weight, bias, str(given["weight"]), geometry, (node,))


def _linear(module: nn.Module, node: torch.fx.Node) -> Product | None:
    operands = _operands(node)
    if operands is None or not isinstance(operands[0], torch.fx.Node):
        return None
    x, matrix, turned, given = operands
    flipped = unflipped(matrix)
    matrix, turned = (matrix, turned) if flipped is None else (flipped, not turned)
    weight, bias = parameter_at(module, matrix), parameter_at(module, given)
    if weight is None or weight.dim() != 2 or (given is not None and bias is None):
        return None
    outputs = weight.shape[1 if turned else 0]
    nodes: tuple[torch.fx.Node, ...] = (node,)
    if bias is None:
        nodes, bias = _with_bias(module, node, outputs)
    if bias is not None and tuple(bias.shape) != (outputs,):
        return None
    return Product("matmul" if turned else "linear", x, weight, bias, str(matrix), {}, nodes)


def _operands(node: torch.fx.Node) -> tuple[Any, Any, bool, Any] | None:
    """Reads (x, matrix, whether the matrix is `[K, N]`, bias) from a call that multiplies by a matrix."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.linear:
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        return given.get("input"), given.get("weight"), False, given.get("bias")
    if node.target in _MATMULS:
        args += [kwargs.pop(key) for key in ("other", "mat2") if key in kwargs]
        return (args[0], args[1], True, None) if len(args) == 2 and not kwargs else None
    if node.target in _ADDMMS:
        args += [kwargs.pop(key) for key in ("mat1", "mat2") if key in kwargs]
        plain = all(kwargs.pop(key, 1) == 1 for key in ("alpha", "beta"))
        return (args[1], args[2], True, args[0]) if len(args) == 3 and not kwargs and plain else None
    return _einsum(args) if node.target is torch.einsum and not kwargs else None


def _einsum(args: list[Any]) -> tuple[Any, Any, bool, None] | None:
    """Reads the operands of an einsum that is a linear: `...i,oi->...o`, `bti,io->bto` and the like."""
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = [args[0], *args[1]]
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    left, arrow, out = args[0].replace(" ", "").partition("->")
    x, comma, matrix = left.partition(",")
    if not arrow or not comma or len(matrix) != 2 or not x or not out or "," in matrix:
        return None
    k, n = x[-1], out[-1]
    rest = x[:-1]
    if "." in (k, n) or k == n or {k, n} != set(matrix) or out[:-1] != rest or k in rest or n in rest:
        return None
    return args[1], args[2], matrix == k + n, None


def unflipped(node: Any) -> torch.fx.Node | None:
    """Returns the matrix that a node transposes; None if it transposes none."""
    if not isinstance(node, torch.fx.Node) or not node.args or node.kwargs:
        return None
    inner: Any = node.args[0]
    axes: Any = node.args[1:]
    if node.op == "call_function" and node.target is getattr:
        name, axes = str(axes[0]), ()
    else:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in _FLIPS or not isinstance(inner, torch.fx.Node):
        return None
    flat: list[Any] = [axis for given in axes for axis in (given if isinstance(given, (list, tuple)) else (given,))]
    if not all(isinstance(axis, int) for axis in flat):
        return None
    order = [axis % 2 for axis in flat]
    turns = order == [1, 0] if name == "permute" else sorted(order) == [0, 1] or not order
    return inner if turns else None


def _with_bias(
    module: nn.Module, node: torch.fx.Node, outputs: int
) -> tuple[tuple[torch.fx.Node, ...], nn.Parameter | None]:
    """Returns the nodes of a product and of the bias add behind it, and the bias; None if there is no such add."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.target not in _ADDS or user.kwargs or len(user.args) != 2:
        return (node,), None
    other = next((arg for arg in user.args if arg is not node), None)
    bias = parameter_at(module, other)
    return ((node,), None) if bias is None or tuple(bias.shape) != (outputs,) else ((user, node), bias)


def parameter_at(module: nn.Module, node: Any) -> nn.Parameter | None:
    """Returns the parameter that a node of the graph reads; None if it is something else."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, nn.Parameter) else None
