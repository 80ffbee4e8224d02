"""Converts ONNX Runtime's `com.microsoft.MatMulNBits`: 2, 4 and 8 bits, blocks of a power of two along K.

- `B`: uint8 `[N, blocks, block_size * bits / 8]`: the canonical bytes, every row padded to whole blocks.
- `scales`: `[N, blocks]`. `zero_points`: uint8 `[N, ceil(blocks * bits / 8)]`, packed along the blocks, low bits first;
  or `[N, blocks]` in the dtype of the scales, which may have fractions (2 and 4 bits); or none for `2 ** (bits - 1)`.
- attributes `K`, `N`, `bits`, `block_size`: at least 16, at most 256 for 2 bits.

Source: ONNX Runtime 1.32, docs/ContribOperators.md, and what its CPU kernel accepts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_bits, check_packed, check_tensor, dtype_name
from gs_kernels.pack.formats.words import (
    checked,
    group_that_divides,
    integer_zero,
    one_or_all,
    regroup,
    take,
    zero_tensor,
)
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import pack_codes, repack, unpack_codes

BLOCK_MIN, BLOCK_DEFAULT = 16, 128
BLOCK_MAX_2BIT = 256


def _check_bits(who: str, bits: int) -> None:
    check_bits(who, bits)
    if bits == 1:
        raise ValueError(f"{who}: bits must be one of 2, 4, 8, got 1; MatMulNBits has no 1-bit weights")


def from_matmul_nbits(
    tensors: Mapping[str, Tensor], attributes: Mapping[str, int], *, name: str = "weight"
) -> PackedWeight:
    """Reads the weight of a MatMulNBits node. Exact.

    Rows whose blocks all share one scale become one group; where the last block is not full, scales of smaller groups
    are repeated.

    Args:
        tensors: `B`, `scales` and perhaps `zero_points`, the inputs of the node; scales and zero points may be flat.
        attributes: `K`, `N`, `bits` (4 if left out) and `block_size` of the node; others are ignored.
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a tensor is missing, unknown (as `g_idx`, which reorders K) or does not fit.
    """
    who = "from_matmul_nbits"
    take(who, name, tensors, "B", "scales", optional=("zero_points",))
    missing = {"K", "N", "block_size"} - set(attributes)
    if missing:
        raise ValueError(f"{who}: attributes of {name} must have K, N, block_size, got no {', '.join(sorted(missing))}")
    n, k, bits, block = (int(attributes.get(key, 4)) for key in ("N", "K", "bits", "block_size"))
    _check_bits(who, bits)
    if block < BLOCK_MIN or block & (block - 1):
        raise ValueError(f"{who}: block_size of {name} must be a power of two >= {BLOCK_MIN}, got {block}")
    blocks = -(-k // block)
    check_tensor(who, f"{name}.B", tensors["B"], (torch.uint8,), (n, blocks, block * bits // 8))
    scales = tensors["scales"].reshape(n, blocks) if tensors["scales"].numel() == n * blocks else tensors["scales"]
    check_tensor(who, f"{name}.scales", scales, FLOATS, (n, blocks))
    zero = _zero(who, name, tensors.get("zero_points"), bits, n, blocks, scales.dtype)
    if _same_in_row(scales) and _same_in_row(zero):
        scales = scales[:, :1].contiguous()
        zero = zero[:, :1].contiguous() if isinstance(zero, Tensor) else zero
    group_size = group_that_divides(who, name, k, block, scales.shape[1])
    codes = tensors["B"].reshape(n, -1)[:, : -(-k * bits // 8)].clone(memory_format=torch.contiguous_format)
    if k * bits % 8:
        codes[:, -1] &= 2 ** (k * bits % 8) - 1  # padding may hold anything there
    scale = regroup(scales, k, block, group_size)
    zero = regroup(zero, k, block, group_size) if isinstance(zero, Tensor) else zero
    weight = PackedWeight(codes, scale, zero, None, bits, (n, k), group_size)
    return checked(who, weight, name)


def _zero(
    who: str, name: str, zeros: Tensor | None, bits: int, n: int, blocks: int, dtype: torch.dtype
) -> Tensor | float:
    if zeros is None:
        return float(2 ** (bits - 1))
    columns = blocks if zeros.dtype in FLOATS else -(-blocks * bits // 8)
    zeros = zeros.reshape(n, columns) if zeros.numel() == n * columns else zeros
    check_tensor(who, f"{name}.zero_points", zeros, (torch.uint8, *FLOATS), (n, columns))
    return one_or_all(zeros if zeros.dtype in FLOATS else unpack_codes(zeros, bits, (n, blocks)), dtype)


def block_size_of(weight: PackedWeight, name: str = "weight") -> int:
    """Returns the largest block that MatMulNBits knows and no group of the weight crosses.

    Raises:
        ValueError: if there is none, for groups that are no multiple of 16.
    """
    limit = BLOCK_MAX_2BIT if weight.bits == 2 else 1 << 30
    if weight.group_size == weight.shape[1]:
        # one scale for all: any block does, and the last need not be full
        return min(BLOCK_DEFAULT, max(BLOCK_MIN, 1 << (weight.group_size - 1).bit_length()))
    block = min(weight.group_size & -weight.group_size, limit)
    if block < BLOCK_MIN:
        raise ValueError(
            f"to_matmul_nbits: group_size of {name} must be a multiple of {BLOCK_MIN}, got {weight.group_size};"
            f" quantize with group_size=32"
        )
    return block


def to_matmul_nbits(weight: PackedWeight, *, name: str = "weight") -> tuple[dict[str, Tensor], dict[str, int]]:
    """Writes the inputs `B`, `scales` and `zero_points` of a MatMulNBits node and its attributes. Exact.

    Groups larger than a block repeat their scale. Scales keep their dtype, which must be that of the activations.
    Zero points with fractions are written as floats in that dtype; ONNX Runtime takes them at 2 and 4 bits.

    Raises:
        ValueError: if the bits are 1, the weight has levels, 8-bit zero points with fractions, or groups that are no
            multiple of 16.
    """
    who = "to_matmul_nbits"
    check_packed(who, weight, name)
    _check_bits(who, weight.bits)
    block, bits, (n, k) = block_size_of(weight, name), weight.bits, weight.shape
    blocks = -(-k // block)
    weight = repack(weight, CANONICAL)
    short = blocks * block * bits // 8 - weight.codes.shape[1]
    tensors = {
        "B": torch.nn.functional.pad(weight.codes, (0, short)).view(n, blocks, -1),
        "scales": _spread(weight.scale, weight, block),
    }
    zero = _exportable_zero(who, weight, name)
    if isinstance(zero, Tensor):
        zero = _spread(zero, weight, block)
        tensors["zero_points"] = pack_codes(zero, bits) if zero.dtype == torch.uint8 else zero
    return tensors, {"K": k, "N": n, "bits": bits, "block_size": block}


def _spread(t: Tensor, weight: PackedWeight, block: int) -> Tensor:
    return regroup(t, weight.shape[1], weight.group_size, block).contiguous()


def _exportable_zero(who: str, weight: PackedWeight, name: str) -> Tensor | None:
    """Returns zero points `[N, G]`: None for the middle of the grid, uint8 for integers, else the scales' dtype."""
    if weight.levels is None and weight.bits < 8 and _has_fractions(weight.zero):
        zero = weight.zero
        if not isinstance(zero, Tensor):
            zero = torch.full_like(weight.scale, zero, dtype=torch.float64)
        cast = zero.to(weight.scale.dtype)
        if not torch.equal(cast.double(), zero.double()):
            raise ValueError(
                f"{who}: zero points of {name} must be exact in {dtype_name(cast.dtype)}, the dtype of its scales,"
                f" got {float(zero[cast != zero][0]):.6g}; use float32 scales"
            )
        return cast
    integers = integer_zero(who, weight, name)
    if isinstance(integers, int) and integers == 2 ** (weight.bits - 1):
        return None
    return zero_tensor(integers, weight.scale)


def _same_in_row(t: Tensor | float) -> bool:
    return bool((t == t[:, :1]).all()) if isinstance(t, Tensor) else True


def _has_fractions(zero: Tensor | float) -> bool:
    return bool((zero != zero.round()).any()) if isinstance(zero, Tensor) else zero != round(zero)
