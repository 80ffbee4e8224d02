"""Converts compressed-tensors `pack-quantized`: what vLLM and llm-compressor read. Its words are the canonical bytes.

- `weight_packed`: int32 `[N, ceil(K * bits / 32)]`: the canonical bytes, every row padded to a whole word.
- `weight_scale`: `[N, G]`, `[N, 1]` per channel, `[1]` per tensor. `weight_shape`: int64 `[2]`.
- `weight_zero_point`: int32 `[ceil(N * bits / 32), G]`, packed along N; none for a symmetric grid, whose zero is
  `2 ** (bits - 1)`. Per tensor it is one int8, signed, in a word of its own.

Source: compressed_tensors/compressors/pack_quantized, version 0.20.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_bits, check_group
from gs_kernels.pack.formats.words import (
    bytes_as_words,
    check_2d,
    checked,
    integer_zero,
    one_or_all,
    pack_words,
    take,
    unpack_words,
    words_as_bytes,
    zero_tensor,
)
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import repack


def from_compressed_tensors(tensors: Mapping[str, Tensor], *, bits: int, name: str = "weight") -> PackedWeight:
    """Reads the weight of a `pack-quantized` module. Exact.

    Args:
        tensors: `weight_packed`, `weight_scale`, `weight_shape` and, if asymmetric, `weight_zero_point`.
        bits: `num_bits` of the quantization config: 1, 2, 4 or 8 (3, 5, 6 and 7 are refused).
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a tensor is missing, unknown (as `weight_g_idx`: K was reordered) or does not fit.
    """
    who = "from_compressed_tensors"
    check_bits(who, bits)
    take(who, name, tensors, "weight_packed", "weight_scale", "weight_shape", optional=("weight_zero_point",))
    words, scale = tensors["weight_packed"], tensors["weight_scale"]
    check_2d(who, f"{name}.weight_packed", words, torch.int32)
    if tensors["weight_shape"].numel() != 2:
        raise ValueError(f"{who}: {name}.weight_shape must hold N and K, got {tensors['weight_shape'].tolist()}")
    n, k = (int(s) for s in tensors["weight_shape"].tolist())
    want = [n, -(-k * bits // 32)]
    if list(words.shape) != want or min(n, k) < 1:
        raise ValueError(
            f"{who}: {name}.weight_packed must have shape {want} for {bits} bits and weight_shape [{n}, {k}],"
            f" got {list(words.shape)}"
        )
    per_tensor = scale.numel() == 1
    scale = scale.reshape(1, 1).expand(n, 1) if per_tensor else scale
    check_2d(who, f"{name}.weight_scale", scale, *FLOATS)
    groups = scale.shape[1]
    check_group(f"{who}: {name} of {groups} groups", k, max(k // groups, 1))
    zero = _zero(who, name, tensors.get("weight_zero_point"), bits, n, groups, per_tensor, scale.dtype)
    codes = words_as_bytes(words)[:, : -(-k * bits // 8)].contiguous()
    weight = PackedWeight(codes, scale.contiguous(), zero, None, bits, (n, k), max(k // groups, 1))
    return checked(who, weight, name)


def _zero(
    who: str, name: str, words: Tensor | None, bits: int, n: int, groups: int, per_tensor: bool, dtype: torch.dtype
) -> Tensor | float:
    if words is None:
        return float(2 ** (bits - 1))
    if per_tensor and words.dtype == torch.int8:
        return float(int(words) + 2 ** (bits - 1))
    check_2d(who, f"{name}.weight_zero_point", words, torch.int32)
    want = [-(-n * bits // 32), groups]
    if list(words.shape) != want:
        raise ValueError(f"{who}: {name}.weight_zero_point must have shape {want}, got {list(words.shape)}")
    return one_or_all(unpack_words(words.T, bits, n).T, dtype)


def to_compressed_tensors(weight: PackedWeight, name: str = "weight") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Writes the tensors of a `pack-quantized` module, and the `weights` entry of its quantization config. Exact.

    Scales keep their dtype: the library computes in it.

    Raises:
        ValueError: if the weight has levels or a zero point that is no code, which this format cannot hold.
    """
    zero = integer_zero("to_compressed_tensors", weight, name)
    weight = repack(weight, CANONICAL)
    (n, k), bits = weight.shape, weight.bits
    symmetric = isinstance(zero, int) and zero == 2 ** (bits - 1)
    tensors = {
        "weight_packed": bytes_as_words(weight.codes),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor([n, k], device="cpu"),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(zero_tensor(zero, weight.scale).T, bits).T.contiguous()
    grouped = weight.group_size != k
    args = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": weight.group_size if grouped else None,
    }
    return tensors, args
