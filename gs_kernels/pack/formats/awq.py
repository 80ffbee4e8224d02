"""Converts AWQ checkpoints (GEMM version, 4 bits): eight neighbours along N in a word, in the order 0 2 4 6 1 3 5 7.

- `qweight`: int32 `[K, N / 8]`. Field i of a word, low bits first, is output feature `8 * word + ORDER[i]`.
- `qzeros`: int32 `[G, N / 8]`, likewise. `scales`: `[G, N]`.

Source: autoawq 0.2.7, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_group
from gs_kernels.pack.formats.words import (
    check_2d,
    checked,
    integer_zero,
    one_or_all,
    take,
    zero_tensor,
)
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import pack_codes, repack, unpack_codes

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _unpack(words: Tensor) -> Tensor:
    """Unpacks int32 `[R, N / 8]` to uint8 `[N, R]`."""
    rows = words.T.contiguous()
    codes = torch.empty(rows.shape[0], 8, rows.shape[1], dtype=torch.uint8, device=words.device)
    for i, n in enumerate(ORDER):
        codes[:, n] = (rows >> (BITS * i)) & 15
    return codes.flatten(0, 1)


def _pack(codes: Tensor) -> Tensor:
    """Packs uint8 `[N, R]` to int32 `[R, N / 8]`."""
    fields = codes.unflatten(0, (-1, 8))
    words = fields[:, ORDER[0]].int()
    for i, n in enumerate(ORDER[1:], start=1):
        words |= fields[:, n].int() << (BITS * i)
    return words.T.contiguous()


def from_awq(tensors: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """Reads the weight of an AWQ module (`"version": "gemm"`). Exact.

    Args:
        tensors: `qweight`, `qzeros`, `scales`.
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a tensor is missing, unknown or does not fit.
    """
    who = "from_awq"
    take(who, name, tensors, "qweight", "qzeros", "scales")
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    check_2d(who, f"{name}.qweight", qweight, torch.int32)
    check_2d(who, f"{name}.qzeros", qzeros, torch.int32)
    check_2d(who, f"{name}.scales", scales, *FLOATS)
    k, n, groups = qweight.shape[0], qweight.shape[1] * 8, scales.shape[0]
    for part, t, want in (("scales", scales, [groups, n]), ("qzeros", qzeros, [groups, n // 8])):
        if list(t.shape) != want:
            raise ValueError(
                f"{who}: {name}.{part} must have shape {want} for qweight {list(qweight.shape)} and scales"
                f" {list(scales.shape)}, got {list(t.shape)}; only the gemm version is read"
            )
    group_size = max(k // groups, 1)
    check_group(f"{who}: {name} of {groups} groups", k, group_size)
    zero = one_or_all(_unpack(qzeros), scales.dtype)
    weight = PackedWeight(
        pack_codes(_unpack(qweight), BITS), scales.T.contiguous(), zero, None, BITS, (n, k), group_size
    )
    return checked(who, weight, name)


def to_awq(weight: PackedWeight, *, name: str = "weight") -> dict[str, Tensor]:
    """Writes the tensors of an AWQ module (`"version": "gemm"`). Exact.

    Scales keep their dtype; most readers want fp16.

    Raises:
        ValueError: if the weight is not of 4 bits, N is no multiple of 8, or it has levels or a zero that is no code.
    """
    who = "to_awq"
    zero = integer_zero(who, weight, name)
    weight = repack(weight, CANONICAL)
    n = weight.shape[0]
    if weight.bits != BITS:
        raise ValueError(f"{who}: {name} must have 4 bits, got {weight.bits}; AWQ has no other width")
    if n % 8:
        raise ValueError(f"{who}: N of {name} must be a multiple of 8, got N={n}; pad the output features")
    codes = unpack_codes(weight.codes, BITS, weight.shape)
    return {
        "qweight": _pack(codes),
        "qzeros": _pack(zero_tensor(zero, weight.scale)),
        "scales": weight.scale.T.contiguous(),
    }
