"""Computes what the ops on quantized keys and values do, in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import quantize_ref
from gs_kernels.formats import PerGroup
from gs_kernels.observe.ref import choose_qparams_ref

LIMITS = {torch.int8: (-127, 127), torch.uint8: (-8, 7)}  # by the dtype of the codes: uint8 holds two of 4 bits
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
    (low, high), group = LIMITS[dtype], PerGroup(x.shape[-1] // groups)
    parts = x.float().unflatten(-1, (groups, -1))
    most = parts.abs().amax(-1)
    scale, zero = choose_qparams_ref(-most, most, qmin=low, qmax=-low, symmetric=True)
    turned = (parts.amax(-1) == most) & (most > 0) & (high < -low)  # the largest in size gets the lowest code
    sign = 1.0 - 2.0 * turned.float()
    rows = (parts * sign[..., None]).flatten(-2)
    codes = quantize_ref(rows, scale.flatten(), zero.flatten(), qmin=low, qmax=high, granularity=group)
    return codes if dtype == torch.int8 else pack_halves(codes.to(torch.int16)), scale * sign


def kv_read_ref(codes: Tensor, scale: Tensor, *, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    levels = codes if codes.dtype == torch.int8 else unpack_halves(codes, size)
    return (levels.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(dtype)
