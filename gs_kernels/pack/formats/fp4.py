"""Converts weights of 4-bit floats: compressed-tensors `nvfp4-pack-quantized`, `mxfp4-pack-quantized`, and MX blocks.

- compressed-tensors: `weight_packed` uint8 `[N, K / 2]`, the canonical bytes.
  mxfp4: `weight_scale` uint8 `[N, K / 32]`, exponents biased by 127.
  nvfp4: `weight_scale` float8_e4m3fn `[N, K / 16]`, and `weight_global_scale` fp32 `[1]`, which scales are divided by.
- MX blocks, as gpt-oss has its experts: blocks uint8 `[..., N, K / 32, 16]`, scales uint8 `[..., N, K / 32]`.

Source: compressed_tensors/compressors/nvfp4 and mxfp4, version 0.20; transformers/integrations/mxfp4.py, version 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gs_kernels.formats import E2M1
from gs_kernels.pack.checks import check_packed, dtype_name
from gs_kernels.pack.formats.words import check_2d, checked, take
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import repack

NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
KINDS = (NVFP4, MXFP4)
BLOCK = 32  # of MX
NAN = 255  # exponent that stands for it


def from_compressed_fp4(tensors: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """Reads the weight of a `nvfp4-pack-quantized` or `mxfp4-pack-quantized` module. Exact.

    Args:
        tensors: `weight_packed`, `weight_scale`, and of nvfp4 `weight_global_scale`.
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a tensor is missing, unknown or does not fit, or a scale is NaN.
    """
    who = "from_compressed_fp4"
    divided = "weight_global_scale" in tensors
    take(who, name, tensors, "weight_packed", "weight_scale", *(("weight_global_scale",) if divided else ()))
    codes, scale = tensors["weight_packed"], tensors["weight_scale"]
    check_2d(who, f"{name}.weight_packed", codes, torch.uint8)
    check_2d(who, f"{name}.weight_scale", scale, torch.float8_e4m3fn if divided else torch.uint8)
    if not divided:
        return _of_exponents(who, codes, scale, name)
    divisor = tensors["weight_global_scale"].reshape(-1)
    if divisor.numel() != 1:
        raise ValueError(f"{who}: {name}.weight_global_scale must be one number, got {list(divisor.shape)}")
    return _made(who, codes, scale, 16, divisor.float(), name)


def from_mx_blocks(blocks: Tensor, scales: Tensor, *, name: str = "weight") -> PackedWeight:
    """Reads MX blocks of 4-bit floats; axes in front of N are rows, too: experts `[E, N, ...]` become `[E * N, K]`.

    Exact.

    Args:
        blocks: uint8 `[..., N, K / 32, 16]`, the element of even index in the low half of a byte.
        scales: uint8 `[..., N, K / 32]`, exponents biased by 127.
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if the tensors do not fit together, or a scale is NaN.
    """
    who = "from_mx_blocks"
    for part, t in (("blocks", blocks), ("scales", scales)):
        if t.dtype != torch.uint8:
            raise TypeError(f"{who}: {name}_{part} must be uint8, got {dtype_name(t.dtype)}")
    if blocks.dim() < 3 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape or not blocks.numel():
        raise ValueError(
            f"{who}: {name}_blocks must be [..., N, K / 32, 16] and {name}_scales [..., N, K / 32], got "
            f"{list(blocks.shape)} and {list(scales.shape)}"
        )
    groups = scales.shape[-1]
    return _of_exponents(who, blocks.reshape(-1, groups * BLOCK // 2), scales.reshape(-1, groups), name)


def to_mx_blocks(weight: PackedWeight, experts: int, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Writes a weight `[E * N, K]` of mxfp4 as blocks `[E, N, K / 32, 16]` and scales `[E, N, K / 32]`, uint8. Exact.

    Raises:
        ValueError: if the weight is of another format, or E does not divide its rows.
    """
    who = "to_mx_blocks"
    check_packed(who, weight, name)
    if weight.scale.dtype != torch.float8_e8m0fnu or weight.group_size != BLOCK:
        got = f"{dtype_name(weight.scale.dtype)} scales for {weight.group_size} inputs"
        raise ValueError(f"{who}: {name} must be of mxfp4, got {got}")
    if experts < 1 or weight.shape[0] % experts:
        raise ValueError(f"{who}: experts must divide the {weight.shape[0]} rows of {name}, got {experts}")
    codes, groups = repack(weight, CANONICAL).codes, weight.shape[1] // BLOCK
    scales = weight.scale.contiguous().view(torch.uint8).view(experts, -1, groups)
    return codes.view(experts, -1, groups, BLOCK // 2), scales


def _of_exponents(who: str, codes: Tensor, scale: Tensor, name: str) -> PackedWeight:
    nan = (scale == NAN).nonzero()
    if len(nan):
        raise ValueError(
            f"{who}: scales of {name} must be exponents below {NAN}, which is NaN, got {NAN} at {nan[0].tolist()} "
            f"({len(nan)} such scales); the file is damaged or the weight was calibrated on NaN"
        )
    return _made(who, codes, scale.contiguous().view(torch.float8_e8m0fnu), BLOCK, None, name)


def _made(who: str, codes: Tensor, scale: Tensor, size: int, divisor: Tensor | None, name: str) -> PackedWeight:
    n, k = codes.shape[0], 2 * codes.shape[1]
    if list(scale.shape) != [n, k // size] or k % size:
        raise ValueError(
            f"{who}: {name} of [{n}, {k}] must have a scale for every {size} inputs, got scales {list(scale.shape)}"
        )
    table = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)
    weight = PackedWeight(codes.contiguous(), scale.contiguous(), 0.0, table, 4, (n, k), size, divisor=divisor)
    return checked(who, weight, name)


def is_fp4(weight: PackedWeight) -> bool:
    """Says whether a weight is one of 4-bit floats with the groups of mxfp4 or nvfp4."""
    return (weight.scale.dtype, weight.group_size) in ((torch.float8_e8m0fnu, BLOCK), (torch.float8_e4m3fn, 16))


def to_compressed_fp4(weight: PackedWeight, name: str = "weight") -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Writes the tensors of such a module, the `weights` entry of its quantization config, and its format. Exact.

    Raises:
        ValueError: if the weight is none of 4-bit floats, or has several divisors.
    """
    who = "to_compressed_fp4"
    check_packed(who, weight, name)
    if not is_fp4(weight) or (weight.divisor is not None and weight.divisor.shape[0] != 1):
        got = f"{dtype_name(weight.scale.dtype)} scales for {weight.group_size} inputs"
        raise ValueError(f"{who}: {name} must be of mxfp4, or of nvfp4 with one divisor, got {got}")
    codes = repack(weight, CANONICAL).codes
    args: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": weight.group_size}
    if weight.divisor is None:
        tensors = {"weight_packed": codes, "weight_scale": weight.scale.view(torch.uint8)}
        return tensors, {**args, "strategy": "group", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}, MXFP4
    tensors = {"weight_packed": codes, "weight_scale": weight.scale, "weight_global_scale": weight.divisor}
    dtype = "torch.float8_e4m3fn"
    return tensors, {**args, "strategy": "tensor_group", "scale_dtype": dtype, "zp_dtype": dtype}, NVFP4
