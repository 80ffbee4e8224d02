"""Takes units out of a live model: puts zeros in their place (mask), or makes the tensors smaller (cut)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import get_module, parent_name
from gs_algos.pruning.channel_groups.groups import Groups, stays, tensors_by_name
from gs_algos.pruning.counted_attention import count_heads
from gs_kernels.runtime.torch_private import _ConvNd, _ConvTransposeNd, _NormBase


@dataclass(frozen=True)
class Cut:
    """Records what a cut left: shapes of the tensors and integer attributes of the modules that changed."""

    shapes: dict[str, list[int]]
    attributes: dict[str, dict[str, int]]


@torch.no_grad()
def mask(model: nn.Module, groups: Groups, keep: Tensor) -> None:
    """Writes zeros into every parameter where it belongs to a unit that goes, in place.

    The network then computes what the sliced one does: what reads a zeroed channel multiplies it by a zeroed weight.
    """
    for tensor, dim, index in zeros(model, groups, keep):
        tensor.data.index_fill_(dim, index, 0)


def zeros(model: nn.Module, groups: Groups, keep: Tensor) -> list[tuple[Tensor, int, Tensor]]:
    """Lists (parameter, dimension, indices) of everything that `mask` zeroes."""
    named = dict(model.named_parameters())
    picks = [(named[name], part) for name, part in picks_of(groups, keep).items() if name in named]
    return [(p, dim, (~kept).nonzero().flatten().to(p.device)) for p, part in picks for dim, kept in part.items()]


def zeroed(tensor: Tensor, picks: dict[int, Tensor]) -> Tensor:
    """Returns the tensor with zeros at the indices that go. picks: dimension -> bool `[size]`, what stays."""
    for dim, kept in picks.items():
        view = [1] * tensor.dim()
        view[dim] = -1
        # where, not a product: 0 * inf would be NaN
        tensor = torch.where(kept.to(tensor.device).view(view), tensor, torch.zeros((), dtype=tensor.dtype).to(tensor))
    return tensor


@torch.no_grad()
def cut(
    model: nn.Module,
    groups: Groups,
    keep: Tensor,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    fresh: bool = False,
) -> Cut:
    """Slices every tensor of the live model that belongs to units that go, with its gradient and optimizer state.

    Parameters stay the same objects, so that optimizers and tied modules keep them, unless a graph of the last step is
    still alive (a loss that somebody holds): it remembers the old shapes.

    Args:
        keep: bool `[groups.n]`, the units that stay.
        optimizers: whose parameters and state are sliced along; any other must be made anew.
        fresh: put new parameters into the modules and leave the old ones as they are.

    Raises:
        ValueError: if a group would lose all its units, or `keep` is not one bool per unit.
        RuntimeError: if an optimizer's state has tensors of another shape than their parameter.
    """
    refuse_empty(groups, keep)
    picks = picks_of(groups, keep)
    named = tensors_by_name(model)
    for name in picks:
        _refuse_state(name, named[name], optimizers)
    counted = [(a, int(stays(keep, a.units).sum()) * a.per) for a in groups.attributes]
    depthwise = {name for name, m in model.named_modules() if _is_depthwise(m)}
    for name, kept in picks.items():
        slicer = _slicer(kept)
        if fresh:
            _replace(model, named[name], slicer(named[name]))
        else:
            _slice_in_place(model, named[name], slicer, optimizers)
    changed: dict[str, dict[str, int]] = {}
    for owner in dict.fromkeys(parent_name(name) for name in picks):
        changed[owner] = _describe(get_module(model, owner), owner in depthwise)
    for attribute, value in counted:
        changed.setdefault(attribute.module, {})[attribute.name] = value
    changed = {name: values for name, values in changed.items() if values}
    set_attributes(model, changed)
    left = tensors_by_name(model)
    return Cut({name: list(left[name].shape) for name in picks}, changed)


def refuse_empty(groups: Groups, keep: Tensor) -> None:
    """Raises ValueError unless `keep` is a bool for every unit and leaves some in every group and every tensor."""
    if keep.dtype != torch.bool or tuple(keep.shape) != (groups.n,):
        raise ValueError(f"cut: keep must be bool [{groups.n}], got {keep.dtype} {list(keep.shape)}")
    for group in groups.prunable():
        if not bool(keep[group.first : group.first + group.n].any()):
            raise ValueError(
                f"cut: group {group.name} must keep one of its {group.n} units, got none; keep one or leave it whole"
            )
    for part in groups.slices:
        if not bool(stays(keep, part.units).any()):
            raise ValueError(f"cut: {part.tensor} must keep an index of dimension {part.dim}, got none")


def resize(model: nn.Module, shapes: dict[str, list[int]], attributes: dict[str, dict[str, int]]) -> None:
    """Gives a freshly built model the shapes that a cut left; the values are those of the first indices.

    Raises:
        ValueError: if a shape is not smaller than, or not of the rank of, the tensor it is for.
    """
    named = tensors_by_name(model)
    for name, shape in shapes.items():
        if name not in named:
            raise ValueError(f"resize: every tensor must be one of the model, got {name!r}")
        tensor = named[name]
        sizes = zip(shape, tensor.shape, strict=False)
        if len(shape) != tensor.dim() or not all(type(n) is int and 0 < n <= most for n, most in sizes):
            raise ValueError(f"resize: {name} must shrink from {list(tensor.shape)}, got {shape}")
        _slice_in_place(model, tensor, _first(shape), ())
    for name, values in attributes.items():
        module = get_module(model, name)
        for key, value in values.items():
            if type(value) is not int or type(module.__dict__.get(key)) is not int or value < 1:
                raise ValueError(f"resize: {name}.{key} must be a number of the module, got {value!r}")
    set_attributes(model, attributes)


def set_attributes(model: nn.Module, attributes: dict[str, dict[str, int]]) -> None:
    """Sets integers of modules; an `nn.MultiheadAttention` becomes one whose heads need not fill its width."""
    for name, values in attributes.items():
        module = get_module(model, name)
        module.__dict__.update(values)
        if isinstance(module, nn.MultiheadAttention):
            count_heads(module)


def picks_of(groups: Groups, keep: Tensor) -> dict[str, dict[int, Tensor]]:
    """Returns tensor -> dimension -> what stays, for tensors that lose something."""
    picks: dict[str, dict[int, Tensor]] = {}
    for part in groups.slices:
        kept = stays(keep, part.units)
        if not bool(kept.all()):
            picks.setdefault(part.tensor, {})[part.dim] = kept
    return picks


def _slicer(picks: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    def sliced(tensor: Tensor) -> Tensor:
        for dim, kept in picks.items():
            tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
        return tensor

    return sliced


def _first(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[tuple(slice(n) for n in shape)].clone()


def _slice_in_place(
    model: nn.Module, tensor: Tensor, slicer: Callable[[Tensor], Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    shape, grad = tensor.shape, tensor.grad
    tensor.grad = None
    tensor.data = _like(slicer(tensor.data), tensor.data)
    new = nn.Parameter(tensor.data) if _is_remembered(tensor) else tensor
    if new is not tensor:
        _replace(model, tensor, new)
    if grad is not None:
        new.grad = slicer(grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if p is tensor else p for p in group["params"]]
        if tensor in optimizer.state:
            state = optimizer.state.pop(tensor)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = _like(slicer(value), value)
            optimizer.state[new] = state


def _is_remembered(tensor: Tensor) -> bool:
    """Returns whether a live autograd graph expects gradients of another shape for this parameter."""
    if not tensor.requires_grad:
        return False
    with torch.enable_grad():
        node = torch.autograd.graph.get_gradient_edge(tensor).node
    return tuple(node._input_metadata[0].shape) != tuple(tensor.shape)


def _like(new: Tensor, old: Tensor) -> Tensor:
    """Copies a tensor to the memory format of the old one, told by its strides: with one channel both formats fit."""
    if old.dim() != 4:
        return new.contiguous()
    last = torch.empty(old.shape, device="meta", memory_format=torch.channels_last).stride()
    form = torch.channels_last if old.stride() == last else torch.contiguous_format
    return torch.empty_like(new, memory_format=form).copy_(new)


def _refuse_state(name: str, tensor: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != tensor.shape:
                raise RuntimeError(
                    f"cut: {type(optimizer).__name__} must keep state in the shape of its parameter, got {key} "
                    f"{list(value.shape)} of {name} {list(tensor.shape)}; make a new optimizer after the cut"
                )


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Puts a new tensor wherever the old one is registered."""
    if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
        new = nn.Parameter(new, requires_grad=False)
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for key, value in slots.items():
                if value is old:
                    slots[key] = new  # type: ignore[assignment]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels


def _describe(module: nn.Module, depthwise: bool) -> dict[str, int]:
    """Returns the integers of a layer that follow from the shapes of its tensors and have changed."""
    sizes: dict[str, int] = {}
    weight: Any = module._parameters.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    if isinstance(module, _ConvTransposeNd):
        groups = shape[0] if depthwise else module.groups
        sizes = {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
    elif isinstance(module, _ConvNd):
        groups = shape[0] * module.groups // module.out_channels if depthwise else module.groups
        sizes = {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}
    elif isinstance(module, nn.Linear):
        sizes = {"in_features": shape[1], "out_features": shape[0]}
    elif isinstance(module, _NormBase):
        channels = next((len(t) for t in (weight, module.running_mean) if t is not None), module.num_features)
        sizes = {"num_features": channels}
    elif isinstance(module, nn.Embedding):
        sizes = {"embedding_dim": shape[1]}
    elif isinstance(module, nn.PReLU):
        sizes = {"num_parameters": shape[0]}
    elif len(shape) == 2 and {"nx", "nf"} <= module.__dict__.keys():  # the Conv1D of GPT-2
        sizes = {"nx": shape[0], "nf": shape[1]}
    return {key: value for key, value in sizes.items() if getattr(module, key) != value}


def removed(groups: Groups, keep: Tensor) -> dict[str, list[int]]:
    """Returns group -> its units that go, each counted from the group's first."""
    gone = {g.name: (~keep[g.first : g.first + g.n]).nonzero().flatten().tolist() for g in groups.prunable()}
    return {name: units for name, units in gone.items() if units}
