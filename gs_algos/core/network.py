"""The network that a caller means: the one inside wrappers, made of tensors that can be trained."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def network_of(model: nn.Module, who: str) -> nn.Module:
    """The network inside what torch.compile, DataParallel and DistributedDataParallel make of one, or the model itself.

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
    """The name of the child that a wrapper wraps; None if the module is no wrapper."""
    if isinstance(module, PARALLEL):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None  # what torch.compile returns


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be trained and saved, also where the caller is in `torch.inference_mode`."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def network_to_train(model: nn.Module, who: str) -> nn.Module:
    """`network_of`, for an algorithm that is going to change it and have it trained.

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
