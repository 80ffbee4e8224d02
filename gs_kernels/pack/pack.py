"""Packs codes into bytes, unpacks, repacks and dequantizes them: plain tensor operations, on any device, traceable."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gs_kernels.fake_quant.cpu import dequantize_cpu
from gs_kernels.pack.checks import (
    FLOATS,
    SCALES_8,
    check_bits,
    check_e2m1,
    check_group,
    check_layout,
    check_packed,
    check_packed_codes,
    dtype_name,
)
from gs_kernels.pack.layouts import BLOCK_K, CANONICAL, PLANAR, PackedWeight
from gs_kernels.runtime.torch_private import is_eager


def pack_codes(codes: Tensor, bits: int, layout: str = CANONICAL) -> Tensor:
    """Packs the codes of a weight into fields of `bits` bits; fields behind the last code are 0.

    Args:
        codes: `[N, K]` uint8, below `2 ** bits`. Higher bits raise for CPU tensors in eager mode, else are dropped.
        bits: 1, 2, 4 or 8.
        layout: `canonical` gives uint8 `[N, ceil(K * bits / 8)]`, `planar` int16 `[ceil(K / 128), N, 8 * bits]`.

    Raises:
        TypeError: if codes are not uint8.
        ValueError: if codes are not `[N, K]`, do not fit the bits, or bits or layout are none of the above.
    """
    check_bits("pack_codes", bits)
    check_layout("pack_codes", layout)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        got = dtype_name(codes.dtype) if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"pack_codes: codes must be a uint8 tensor, got {got}; pack_weight takes signed codes")
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"pack_codes: codes must be [N, K] with N, K >= 1, got {list(codes.shape)}; reshape them")
    if bits < 8 and codes.device.type == "cpu" and is_eager(codes) and int(codes.max()) >= 2**bits:
        raise ValueError(f"pack_codes: codes must be in 0..{2**bits - 1} for {bits} bits, got {int(codes.max())}")
    return _pack_planar(codes, bits) if layout == PLANAR else _pack_canonical(codes, bits)


def _pad(codes: Tensor, multiple: int) -> Tensor:
    short = -codes.shape[1] % multiple
    return torch.nn.functional.pad(codes, (0, short)) if short != 0 else codes


def _pack_canonical(codes: Tensor, bits: int) -> Tensor:
    fields = 8 // bits
    if fields == 1:
        return codes.clone(memory_format=torch.contiguous_format)
    split = _pad(codes, fields).unflatten(1, (-1, fields))  # [N, bytes, fields]
    packed = split[..., 0] & (2**bits - 1)
    for j in range(1, fields):
        packed = packed | ((split[..., j] & (2**bits - 1)) << (j * bits))
    return packed.contiguous()


def _pack_planar(codes: Tensor, bits: int) -> Tensor:
    fields = 16 // bits
    split = _pad(codes, BLOCK_K).unflatten(1, (-1, fields, 8 * bits)).permute(1, 2, 0, 3)  # [blocks, fields, N, W]
    packed = (split[:, 0] & (2**bits - 1)).to(torch.int16)
    for j in range(1, fields):
        packed = packed | ((split[:, j] & (2**bits - 1)).to(torch.int16) << (j * bits))
    return packed.contiguous()


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, int], layout: str = CANONICAL) -> Tensor:
    """Unpacks what `pack_codes` packed, to uint8 codes `[N, K]`.

    Args:
        packed: as `pack_codes` gives it, any strides.
        bits: 1, 2, 4 or 8.
        shape: (N, K).
        layout: `canonical` or `planar`.

    Raises:
        TypeError, ValueError: if packed has not the dtype and shape that follow from the rest.
    """
    check_packed_codes("unpack_codes", packed, bits, shape, layout, "packed")
    return _unpack(packed, bits, shape[1], layout)


def codes_of(weight: PackedWeight) -> Tensor:
    """Gives the codes `[N, K]`, uint8, of a weight that was checked."""
    return _unpack(weight.codes, weight.bits, weight.shape[1], weight.layout)


def _unpack(packed: Tensor, bits: int, k: int, layout: str) -> Tensor:
    codes = _unpack_planar(packed, bits) if layout == PLANAR else _unpack_canonical(packed, bits)
    return codes if codes.shape[1] == k else codes[:, :k].contiguous()


def _unpack_canonical(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    fields = 8 // bits
    codes = packed.new_empty(*packed.shape, fields)
    for j in range(fields):
        codes[..., j] = (packed >> (j * bits)) & (2**bits - 1)
    return codes.flatten(1)


def _unpack_planar(packed: Tensor, bits: int) -> Tensor:
    blocks, n, width = packed.shape
    fields = 16 // bits
    codes = packed.new_empty(n, blocks, fields, width, dtype=torch.uint8)
    rows = packed.transpose(0, 1)  # [N, blocks, W]
    for j in range(fields):
        codes[:, :, j] = (rows >> (j * bits)) & (2**bits - 1)
    return codes.flatten(1)


def pack_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | float | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    levels: Tensor | None = None,
    layout: str = CANONICAL,
    divisor: Tensor | None = None,
) -> PackedWeight:
    """Makes a weight of its codes: `real = (code - zero) * scale`, or `levels[code] * scale`. Rounds nothing.

    Signed codes are stored from 0 upwards: `code + 2 ** (bits - 1)`, and so are their zero points.

    Args:
        codes: `[N, K]` uint8 in `0..2 ** bits - 1`, or int8 in `-2 ** (bits - 1)..2 ** (bits - 1) - 1`.
        scale: `[N, G]` fp32 / fp16 / bf16, with levels also float8_e8m0fnu / float8_e4m3fn, or as `quantize` takes it:
            flat, `[N * G]`, or `[1]` for one for all.
        zero: the code, of those given, that stands for 0.0: like scale, or one number. None is the middle of the grid:
            0 for int8 codes, `2 ** (bits - 1)` for uint8, half a step lower for 1 bit, whose values are ±scale / 2; 0
            with levels. A tensor of one value everywhere is kept as a number (not while tracing).
        bits: 1, 2, 4 or 8.
        group_size: elements of a row that share a scale; None for K.
        levels: `[2 ** bits]` fp32 for a grid that is not evenly spaced; codes are then uint8 and zero 0.
        layout: `canonical` or `planar`.
        divisor: `[D]` fp32 that scales of float8_e4m3fn are divided by, each for N / D rows in turn.

    Raises:
        TypeError, ValueError: if the arguments do not fit together.
    """
    check_bits("pack_weight", bits)
    if not isinstance(codes, Tensor) or codes.dtype not in (torch.int8, torch.uint8):
        got = dtype_name(codes.dtype) if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"pack_weight: codes must be an int8 or uint8 tensor, got {got}")
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"pack_weight: codes must be [N, K] with N, K >= 1, got {list(codes.shape)}; reshape them")
    signed, half = codes.dtype == torch.int8, 2 ** (bits - 1)
    if signed and levels is not None:
        raise TypeError("pack_weight: codes must be uint8 with levels, got int8; they are indices into levels")
    n, k = codes.shape
    group_size = k if group_size is None else group_size
    check_group("pack_weight", k, group_size)
    scale = _grouped("scale", scale, n, k // group_size)
    if zero is None:
        zero = 0.0 if levels is not None else half - (0.5 if bits == 1 else 0.0)
    elif isinstance(zero, Tensor):
        zero = _one_or_all(_grouped("zero", zero, n, k // group_size), half if signed else 0)
    else:
        zero = float(zero) + (half if signed else 0)
    unsigned = _unsigned(codes, bits) if signed else codes
    packed = pack_codes(unsigned, bits, layout)
    weight = PackedWeight(packed, scale, zero, levels, bits, (n, k), group_size, layout, divisor)
    check_packed("pack_weight", weight)
    if is_eager(scale):
        check_e2m1("pack_weight", weight)
    return weight


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    if codes.device.type == "cpu" and is_eager(codes):
        low, high = (int(t) for t in torch.aminmax(codes))
        if low < -half or high >= half:
            raise ValueError(
                f"pack_weight: int8 codes must be in {-half}..{half - 1} for {bits} bits, got {low}..{high}"
            )
    return codes.view(torch.uint8) + half  # wraps around at 256, as two's complement does


def _grouped(name: str, t: Tensor, n: int, groups: int) -> Tensor:
    """Returns `[N, G]` of that, of `[N * G]`, or of `[1]`."""
    if not isinstance(t, Tensor) or t.dtype not in (*FLOATS, *SCALES_8):
        got = dtype_name(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"pack_weight: {name} must be a float32 / float16 / bfloat16 tensor, got {got}")
    t = t.detach()
    if tuple(t.shape) == (n, groups):
        return t
    if t.dim() == 1 and t.shape[0] == n * groups:
        return t.view(n, groups)
    if t.dim() == 1 and t.shape[0] == 1:
        return t.expand(n, groups).contiguous()
    raise ValueError(
        f"pack_weight: {name} must have shape [{n}, {groups}] or [{n * groups}] for {n} rows of {groups} groups,"
        f" got {list(t.shape)}"
    )


def _one_or_all(zero: Tensor, shift: int) -> Tensor | float:
    if is_eager(zero):
        low, high = (float(t) for t in torch.aminmax(zero))
        if low == high:
            return low + shift
    return (zero.float() + shift).to(zero.dtype) if shift else zero


def repack(weight: PackedWeight, layout: str) -> PackedWeight:
    """Returns the same weight in another layout; the weight itself if it has that layout."""
    check_packed("repack", weight)
    check_layout("repack", layout)
    if weight.layout == layout:
        return weight
    return replace(weight, codes=pack_codes(codes_of(weight), weight.bits, layout), layout=layout)


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Computes the real values `[N, K]`, `(code - zero) * scale` or `levels[code] * scale`, in fp32 with one last cast.

    Args:
        weight: in either layout.
        dtype: of the result: fp32 / fp16 / bf16.

    Raises:
        TypeError, ValueError: if the tensors of the weight do not fit together, or dtype is none of the above.
    """
    check_packed("dequantize_packed", weight)
    if dtype not in FLOATS:
        names = " / ".join(map(dtype_name, FLOATS))
        raise TypeError(f"dequantize_packed: dtype must be {names}, got {dtype}")
    codes = codes_of(weight)
    scale, zero = weight.real_scale(), weight.zero
    zero = zero.detach().float() if isinstance(zero, Tensor) else torch.full_like(scale, zero)
    if codes.device.type == "cpu" and is_eager(codes, scale):
        return dequantize_cpu(codes, scale.flatten(), zero.flatten(), -1, weight.group_size, dtype, weight.levels)
    if weight.levels is not None:
        return (
            (weight.levels.detach()[codes.view(-1, weight.group_size).int()] * scale.view(-1, 1))
            .to(dtype)
            .view(codes.shape)
        )
    grouped = codes.unflatten(1, (-1, weight.group_size)).float()  # [N, G, group_size]
    return ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).to(dtype).flatten(1)
