"""Sets a packed weight as the parameters of an engine's layer, and gets it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gs_algos.quant.packed.module import KERNEL_DEVICES, PackedFormat, tensors_of
from gs_algos.serving.shards import WHO
from gs_kernels import PackedWeight, repack
from gs_kernels.pack.checks import check_packed, check_packed_values
from gs_kernels.pack.formats.compressed_tensors import from_compressed_tensors
from gs_kernels.pack.layouts import PLANAR


def set_weight(layer: nn.Module, names: Mapping[str, str], weight: PackedWeight, name: str) -> str:
    """Replaces the layer's parameters by the weight's tensors, after checks; returns the layout, that of the device.

    Args:
        names: part of the weight -> parameter of the layer.
        name: of the weight in errors.
    """
    check_packed(WHO, weight, name)
    check_packed_values(WHO, weight, name)
    if weight.codes.device.type in KERNEL_DEVICES:
        weight = repack(weight, PLANAR)
    for part, tensor in tensors_of(weight).items():
        # compilers know plain parameters only
        layer.register_parameter(names[part], nn.Parameter(tensor.data, requires_grad=False))
    return weight.layout


def get_weight(layer: nn.Module, names: Mapping[str, str], format: PackedFormat, layout: str) -> PackedWeight:
    """Returns the packed weight whose tensors are the layer's parameters."""
    return PackedWeight(
        codes=getattr(layer, names["codes"]),
        scale=getattr(layer, names["scale"]),
        zero=getattr(layer, names["zero"]) if format.zero is None else format.zero,
        levels=getattr(layer, names["levels"]) if format.levels else None,
        bits=format.bits,
        shape=format.shape,
        group_size=format.group_size,
        layout=layout,
    )


def from_words(
    words: Tensor, scale: Tensor, zeros: Tensor | None, *, bits: int, parts: list[int], columns: int, group_size: int
) -> PackedWeight:
    """Makes a packed weight, exactly, of the int32 words that engines load from compressed-tensors, GPTQ or AWQ.

    Args:
        words: `[N, ceil(K * bits / 32)]`, packed along K.
        scale: `[N, G]`.
        zeros: `[N * bits / 32, G]`, packed along N; None for a symmetric grid.
        parts: rows of each layer that is stacked here.
        columns: K.
        group_size: K for one scale a row.

    Raises:
        ValueError: if the sizes do not fit together, or layers with zero points end within a word: the engine has then
            stacked or cut them wrongly.
    """
    broken = [rows for rows in parts if rows * bits % 32] if zeros is not None else []
    if broken:
        raise ValueError(
            f"{WHO}: rows of layers that have zero points must be a multiple of {32 // bits}, got {broken[0]}; "
            "use a smaller tensor_parallel_size, or convert the checkpoint with golden-stick import"
        )
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([sum(parts), columns])}
    if zeros is not None:
        tensors["weight_zero_point"] = zeros
    weight = from_compressed_tensors({k: t.contiguous() for k, t in tensors.items()}, bits=bits)
    if weight.group_size != group_size:
        raise ValueError(
            f"{WHO}: {columns} columns must have {columns // group_size} groups, got {scale.shape[1]} scales a row"
        )
    return weight
