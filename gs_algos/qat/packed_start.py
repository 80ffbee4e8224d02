"""Starts a training where PTQ, or another library, left a network: on its packed weights and their very grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.packed.linear import PackedLinear
from gs_algos.quant.packed.module import WEIGHT_TENSORS
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight, dequantize_packed, fake_quant

CLOSE = 2.0**-10  # of a step, by which a packed value may miss its level


@torch.no_grad()
def start_from(model: nn.Module, layers: dict[str, FakeQuantized], packed: nn.Module, who: str) -> None:
    """Takes over the packed weights, their steps and zero points, and all other tensors of the same names.

    Args:
        model: prepared; changed in place, and not at all if this raises.
        layers: those of the model that are trained, by name; their steps are learned.
        packed: a network of the same structure and names whose same layers are `PackedLinear`.
        who: who asks, which errors begin with.

    Raises:
        ValueError: if layers, tensors or shapes of the two differ, a step is not learned, or the scheme of a layer
            cannot hold its packed values.
    """
    theirs = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear) and not m.tied}
    if layers.keys() != theirs.keys():
        raise ValueError(
            f"{who}: the same layers must be packed there and quantized here, got only packed: "
            f"{_some(theirs.keys() - layers.keys())}; only quantized: {_some(layers.keys() - theirs.keys())}; choose "
            "them by rules"
        )
    grids = {name: _grid(name, layer, theirs[name], who) for name, layer in layers.items()}
    own, given = model.state_dict(), packed.state_dict()
    taken = {f"{name}.{part}" for name in layers for part in WEIGHT_TENSORS}
    made = {key for name, layer in layers.items() for key in _made(name, layer)}
    lacking, unknown = own.keys() - made - given.keys(), given.keys() - taken - own.keys()
    if lacking or unknown:
        raise ValueError(
            f"{who}: all other tensors must have the same names, got only here: {_some(lacking)}; only there: "
            f"{_some(unknown)}; pack a network of the same structure"
        )
    others = [key for key in own if key not in made]
    for key in others:
        if own[key].shape != given[key].shape:
            raise ValueError(f"{who}: {key} must be {list(own[key].shape)}, got {list(given[key].shape)}")
    for key in others:
        own[key].copy_(given[key])
    for name, layer in layers.items():
        weight, scale, zero = grids[name]
        layer.weight.copy_(weight)
        layer.weight_quantizer.scale.copy_(scale)
        layer.weight_quantizer.zero.copy_(zero)


def _made(name: str, layer: FakeQuantized) -> list[str]:
    """Names the tensors that are made of packed ones, or that only training has."""
    parts = [f"{name}.weight"]
    for child, quantizer in layer.named_children():
        parts += [f"{name}.{child}.{part}" for part in quantizer.state_dict()]
    return parts


def _grid(name: str, layer: FakeQuantized, theirs: PackedLinear, who: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weight, steps > 0 and zero points of a layer."""
    quantizer, weight, packed = layer.weight_quantizer, dequantize_packed(theirs.packed, torch.float32), theirs.packed
    scheme = quantizer.scheme
    if not scheme.learned:
        raise ValueError(f"{who}: steps must be learned, got {scheme} at {name}; use {scheme}:lsq")
    if weight.shape != layer.weight.shape or packed.scale.numel() != quantizer.scale.numel():
        raise ValueError(
            f"{who}: {name} must have weights {list(layer.weight.shape)} with {quantizer.scale.numel()} scales, as "
            f"{scheme} has them, got {list(weight.shape)} with {packed.scale.numel()}"
        )
    scale, zero = _positive(packed, scheme)
    if packed.levels is None and (not scheme.symmetric or not zero.any()):
        grid = fake_quant(weight, scale, zero, qmin=scheme.qmin, qmax=scheme.qmax, granularity=scheme.granularity)
        if ((grid - weight).abs().view(len(scale), -1) <= CLOSE * scale.view(-1, 1)).all():
            return weight, scale, zero
    raise ValueError(
        f"{who}: {scheme} must hold the packed values of {name}, got {packed.bits} bits with "
        f"{'a table of levels' if packed.levels is not None else 'scales of both signs, or zero points'}; use "
        f"int{packed.bits} and :asym"
    )


def _positive(weight: PackedWeight, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Returns steps and zero points, `[C]` fp32; turns groups of negative scales around.

    Of codes q in low..high: `(q - z) s = (low + high - q - (low + high - z)) |s|`.
    """
    scale = weight.scale.float().flatten()
    zero = torch.as_tensor(weight.zero, device=scale.device).float().expand(weight.scale.shape).flatten()
    zero = zero - 2 ** (weight.bits - 1) if scheme.qmin < 0 else zero
    return scale.abs(), torch.where(scale < 0, scheme.qmin + scheme.qmax - zero, zero)


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3]) or "none"
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
