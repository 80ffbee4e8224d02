"""Holds the tensors of a teacher that is trained beside its student, as tensors of the student's root.

They are then in its `parameters()` and `state_dict()`: optimizers, checkpoints, devices and DistributedDataParallel
have them as they have the student's. Only tensors are there, no module, which a Sequential would run; the teacher
itself computes with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HELD = "distill_teacher_{}"
Fact = dict[str, Any]  # of a tensor: name in the teacher, shape, dtype, trained: None of a buffer


def check_trainable(teacher: nn.Module, who: str) -> None:
    """Raises ValueError if no parameter of a teacher takes a gradient."""
    if not any(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError(
            f"{who}: a teacher that is trained must have parameters that take gradients, got none; call "
            "requires_grad_() on it, or leave train_teacher out"
        )


def facts_of(teacher: nn.Module) -> list[Fact]:
    """Lists the tensors of a teacher's `state_dict`, each once, as JSON has them."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "trained": tensor.requires_grad if isinstance(tensor, nn.Parameter) else None,
        }
        for name, tensor in _tensors(teacher).items()
    ]


def hold(model: nn.Module, facts: list[Fact], teacher: nn.Module | None = None) -> None:
    """Gives the root of a model the tensors of a teacher; without one, new ones, which `load` fills."""
    own = {} if teacher is None else _tensors(teacher)
    for number, fact in enumerate(facts):
        tensor = own.get(fact["name"])
        if tensor is None:
            tensor = torch.zeros(fact["shape"], dtype=getattr(torch, fact["dtype"]))
        if fact["trained"] is None:
            model.register_buffer(HELD.format(number), tensor)
        elif isinstance(tensor, nn.Parameter):
            model.register_parameter(HELD.format(number), tensor)
        else:
            model.register_parameter(HELD.format(number), nn.Parameter(tensor, requires_grad=fact["trained"]))


def tie(model: nn.Module, facts: list[Fact], teacher: nn.Module, who: str) -> None:
    """Makes a teacher compute with the tensors that the root of the model holds.

    Raises:
        ValueError: if the teacher is not of the form of the one that the training began with.
    """
    own = _tensors(teacher)
    theirs = {fact["name"]: fact["shape"] for fact in facts}
    shapes = {name: list(tensor.shape) for name, tensor in own.items()}
    differs = [name for name in theirs.keys() | shapes.keys() if theirs.get(name) != shapes.get(name)]
    if differs:
        name = min(differs)
        raise ValueError(
            f"{who}: the teacher must be of the form of the one that the training began with, got {name} of shape "
            f"{shapes.get(name)}, which had {theirs.get(name)}; build that network again"
        )
    held = {id(own[fact["name"]]): _held(model, number) for number, fact in enumerate(facts)}
    for module in teacher.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({key: held[id(tensor)] for key, tensor in slots.items() if id(tensor) in held})  # type: ignore[misc]


def release(model: nn.Module, facts: list[Fact]) -> None:
    """Takes the tensors of a teacher off the root of a model."""
    for number, fact in enumerate(facts):
        if fact["trained"] is None:
            del model._buffers[HELD.format(number)]
        else:
            del model._parameters[HELD.format(number)]


def _held(model: nn.Module, number: int) -> Tensor:
    name = HELD.format(number)
    tensor: Tensor | None = (model._parameters if name in model._parameters else model._buffers)[name]
    assert tensor is not None
    return tensor


def _tensors(teacher: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters, and the buffers that a checkpoint holds, each once."""
    saved = teacher.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()) if name in saved}
