"""Maps the names that tracers give to operations, and the classes of leaf modules, to canonical op names."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from gs_kernels import activations

CONVS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
ACTIVATIONS = tuple(name for name in activations.ACTIVATIONS if name != "none")
PRODUCTS = ("matmul", "addmm", "mm", "bmm", "einsum")
NOOPS = ("identity", "contiguous", "clone")  # change no value, in training either: looked through
CASTS = ("to", "_to_copy", "type_as")  # looked through where the type stays the same
WEIGHTED = (*CONVS, *TRANSPOSED_CONVS, "linear")  # ops whose second argument is a weight
DROPPED = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "sym_constrain_range_for_size")

# op of a call by the tracer's own name, in-place underscore removed; anything else is "other"
_BY_NAME = {
    **{name: name for name in (*CONVS, *TRANSPOSED_CONVS, *ACTIVATIONS)},
    **{
        name: name
        for name in ("linear", "batch_norm", "add", "cat", "index_select", "embedding", "flatten", "dropout", "softmax")
    },
    **{name: name for name in ("layer_norm", "group_norm", "instance_norm", "rms_norm", "lstm", "gru", "contiguous")},
    **{
        name: name for name in ("clone", "matmul", "addmm", "bmm", "mm", "sigmoid", "tanh", "hardsigmoid", "leaky_relu")
    },
    **dict.fromkeys(("alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d"), "dropout"),
    **{f"{kind}{n}d": "pool" for kind in ("max_pool", "avg_pool") for n in (1, 2, 3)},
    **{f"adaptive_{kind}{n}d": "pool" for kind in ("max_pool", "avg_pool") for n in (1, 2, 3)},
    "iadd": "add",
    "einsum": "einsum",
    "concat": "cat",
    "concatenate": "cat",
    "hardtanh": "relu6",  # only with limits 0 and 6, see op_of_call
    "scaled_dot_product_attention": "attention",
}

# op of a leaf module by isinstance, first hit wins
_BY_CLASS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.ConvTranspose1d, "conv_transpose1d"),
    (nn.ConvTranspose2d, "conv_transpose2d"),
    (nn.ConvTranspose3d, "conv_transpose3d"),
    (nn.Linear, "linear"),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "batch_norm"),
    *((act.module, name) for name, act in activations.ACTIVATIONS.items() if act.module is not None),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.LeakyReLU, "leaky_relu"),
    (nn.Softmax, "softmax"),
    (nn.Identity, "identity"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout), "dropout"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    (nn.LayerNorm, "layer_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.RMSNorm, "rms_norm"),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "instance_norm"),
    (nn.Flatten, "flatten"),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), "pool"),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "pool"),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "pool"),
    (nn.LSTM, "lstm"),
    (nn.GRU, "gru"),
)
SITES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def op_of_module(module: nn.Module) -> str:
    """Returns the canonical op of a module by its class; "other" if it is none of the known leaves."""
    return next((op for classes, op in _BY_CLASS if isinstance(module, classes)), "other")


def op_of_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Returns the canonical op of a function, method or ATen call by its bare name, e.g. "conv2d", "relu_", "add"."""
    bare = name.rstrip("_")
    op = _BY_NAME.get(bare, "other")
    if bare == "hardtanh":
        low, high = [*args[1:3], kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0)][:2]
        return "relu6" if (low, high) == (0, 6) else "other"
    if op == "add" and kwargs.get("alpha", 1) != 1:
        return "other"
    return op


def bare_name(target: Any) -> str:
    """Returns the bare name of a call's target: an ATen overload, a Python function, an operator or a method's name."""
    if isinstance(target, str):
        return target
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", target))


def is_container(module: nn.Module) -> bool:
    """Says whether a module is a Sequential or the like, which compute nothing of their own."""
    return isinstance(module, _CONTAINERS) and _inherits_torch(module, "forward")


def is_hookable(module: nn.Module) -> bool:
    """Says whether a module takes forward hooks: those of TorchScript refuse them."""
    return not isinstance(module, torch.jit.ScriptModule)


def is_plain(module: nn.Module) -> bool:
    """Says whether a module's forward is the one of torch.nn, so that its class says all that it computes.

    False for a subclass with its own forward (timm's Conv2dSame pads first) and for a forward patched on the instance.
    """
    if op_of_module(module) == "other" or "forward" in module.__dict__:
        return False
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return _inherits_torch(module, "forward") and _inherits_torch(module, "_conv_forward")
    return _inherits_torch(module, "forward")


def _inherits_torch(module: nn.Module, method: str) -> bool:
    owner = next(cls for cls in type(module).__mro__ if method in cls.__dict__)
    return owner.__module__.startswith("torch.nn.")
