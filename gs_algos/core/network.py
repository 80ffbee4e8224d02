"""Finds the network that a caller means, inside wrappers, and checks that its tensors can be trained."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gs_kernels.runtime.torch_private import autocasts

COMPILED = re.compile(r"\b_orig_mod\.|\._orig_mod$")  # in names of modules and tensors
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def network_of(model: nn.Module, who: str) -> nn.Module:
    """Returns the network inside torch.compile, DataParallel or DistributedDataParallel, or the model itself.

    who: the caller, for messages, e.g. "SimQAT.convert".

    Raises:
        TypeError: if it is no module, or one whose layers cannot be replaced: scripted, or sharded by FSDP 1.
    """
    inner = model
    while (key := wrapped_at(inner)) is not None:
        inner = inner.get_submodule(key)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"{who}: model must be a nn.Module, got {type(inner).__name__}")
    if isinstance(inner, torch.jit.ScriptModule):
        raise TypeError(
            f"{who}: model must be made of modules that run in Python, got a {type(inner).__name__}; "
            "pass the network that torch.jit made it from"
        )
    for name, module in inner.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{who}: model must have whole layers, got a FullyShardedDataParallel at {name or 'its root'}; "
                "pass the network itself, and shard what apply returns with fully_shard"
            )
    return inner


def wrapped_at(module: nn.Module) -> str | None:
    """Returns the name of the child that a wrapper wraps; None if the module is no wrapper."""
    if isinstance(module, PARALLEL):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None  # what torch.compile returns


def plain_names(value: Any) -> Any:
    """Returns plain values (dicts, lists, text) with all names in them as without wrappers of torch.compile inside."""
    if isinstance(value, str):
        return COMPILED.sub("", value)
    if isinstance(value, dict):
        return {plain_names(key): plain_names(item) for key, item in value.items()}
    return [plain_names(item) for item in value] if isinstance(value, list | tuple) else value


def names_inside(value: Any, model: nn.Module) -> Any:
    """Reverses `plain_names`: gives names as they are in a model, in which torch.compile wraps some modules."""
    if isinstance(value, str):
        for name, module in model.named_modules():
            if name and wrapped_at(module) == "_orig_mod" and f"{value}.".startswith(f"{name}."):
                value = f"{name}._orig_mod{value[len(name) :]}"
        return value
    if isinstance(value, dict):
        return {names_inside(key, model): names_inside(item, model) for key, item in value.items()}
    return [names_inside(item, model) for item in value] if isinstance(value, list | tuple) else value


def is_compiled(model: nn.Module, name: str) -> bool:
    """Returns whether torch.compile wraps the module of this name: the wrapper would go on calling a replaced one."""
    parent, _, key = name.rpartition(".")
    return key == "_orig_mod" and wrapped_at(model.get_submodule(parent)) == key


@contextlib.contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Puts what torch.compile wraps below the root in the place of its wrapper, for the duration of the block."""
    taken: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and type(child).__name__ == "OptimizedModule":
                taken.append((parent, key, child, child.get_submodule("_orig_mod")))
    for parent, key, _, inner in taken:
        parent._modules[key] = inner
    try:
        yield
    finally:
        for parent, key, wrapper, inner in taken:
            if parent._modules.get(key) is inner:
                parent._modules[key] = wrapper


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Turns autocast off for the block: grids, statistics and codes are computed in the dtypes that tensors have."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda") if autocasts() else ():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Makes tensors of the block trainable and savable, also where the caller is in `torch.inference_mode`."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def network_to_train(model: nn.Module, who: str) -> nn.Module:
    """Returns `network_of`, checked for an algorithm that changes it and has it trained.

    Raises:
        TypeError: as `network_of`.
        ValueError: if DistributedDataParallel has taken its parameters already, or a tensor of it has no data or was
            made in `torch.inference_mode`, so that no training could change it.
    """
    network = network_of(model, who)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"{who}: model must not be in DistributedDataParallel yet, which has taken its parameters; "
            "pass model.module, and wrap what apply returns"
        )
    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{who}: every module must have its weights, got {name} of a lazy one; run one forward pass first"
            )
        if tensor.is_inference():
            raise ValueError(
                f"{who}: parameters and buffers must be ordinary tensors, got {name} made in torch.inference_mode; "
                "build the network outside of it"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{who}: parameters and buffers must have data, got {name} on the meta device; "
                "give the network its weights first"
            )
    return network
