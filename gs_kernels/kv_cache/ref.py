"""Computes what the ops on quantized keys and values do, in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import quantize_ref
from gs_kernels.formats import PerGroup
from gs_kernels.observe.ref import choose_qparams_ref

QMAX = {torch.int8: 127, torch.uint8: 7}  # by the dtype of the codes: uint8 holds two of 4 bits
OFFSET = 8  # that a code of 4 bits is stored with


def pack_halves(codes: Tensor) -> Tensor:
    """Packs codes `[..., D]` of -8..7 to bytes `[..., W]`, W = ceil(D / 2): byte j has code j below code j + W."""
    codes = codes + OFFSET
    low, high = codes.tensor_split([(codes.shape[-1] + 1) // 2], -1)
    high = torch.nn.functional.pad(high, (0, low.shape[-1] - high.shape[-1]), value=OFFSET)
    return (low | high << 4).to(torch.uint8)


def unpack_halves(codes: Tensor, size: int) -> Tensor:
    """Returns the codes `[..., size]` of what `pack_halves` packed, in int8."""
    return torch.cat([codes & 15, codes >> 4], -1)[..., :size].to(torch.int8) - OFFSET


def kv_codes_ref(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes the codes `[..., W]` of x `[..., D]` and their scales `[..., groups]`."""
    qmax, group = QMAX[dtype], PerGroup(x.shape[-1] // groups)
    most = x.float().unflatten(-1, (groups, -1)).abs().amax(-1)
    scale, zero = choose_qparams_ref(-most, most, qmin=-qmax, qmax=qmax, symmetric=True)
    codes = quantize_ref(x.contiguous(), scale.flatten(), zero.flatten(), qmin=-qmax, qmax=qmax, granularity=group)
    return codes if dtype == torch.int8 else pack_halves(codes.to(torch.int16)), scale


def kv_read_ref(codes: Tensor, scale: Tensor, *, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    levels = codes if codes.dtype == torch.int8 else unpack_halves(codes, size)
    return (levels.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(dtype)
