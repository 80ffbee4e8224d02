"""Converts GPTQ checkpoints: `gptq` (version 1) and `gptq_v2`, of 2, 4 and 8 bits, with or without act-order.

- `qweight`: int32 `[K * bits / 32, N]`, fields of consecutive k, low bits first: its transpose is the canonical bytes.
- `qzeros`: int32 `[G, N * bits / 32]`, packed along N. Version 1 stores zero - 1.
- `scales`: `[G, N]`. `g_idx`: int32 `[K]`, the group of every k; with act-order it is in no order.

Version 1 subtracts 1 from whole words, borrowing between fields: so a zero point of 0 changes its neighbours, and
readers that add 1 to each field get another result. We add to whole words, which undoes it, and write no such word.

Source: auto-gptq 0.7.1, nn_modules/qlinear/qlinear_cuda.py; GPTQModel 7.3.4, nn_modules/qlinear and utils/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_bits
from gs_kernels.pack.formats.words import (
    bytes_as_words,
    check_2d,
    checked,
    group_that_divides,
    integer_zero,
    one_or_all,
    pack_words,
    regroup,
    take,
    unpack_words,
    words_as_bytes,
    zero_tensor,
)
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import pack_codes, repack, unpack_codes


def _ones(bits: int) -> int:
    """Returns a word with 1 in every field."""
    return (2**32 - 1) // (2**bits - 1)


def _check(who: str, bits: int, version: int) -> None:
    check_bits(who, bits)
    if bits == 1:
        raise ValueError(f"{who}: bits must be one of 2, 4, 8, got 1; GPTQ has no 1-bit weights")
    if version not in (1, 2):
        raise ValueError(f"{who}: version must be 1 ('gptq') or 2 ('gptq_v2'), got {version!r}")


def from_gptq(
    tensors: Mapping[str, Tensor], *, bits: int, group_size: int, version: int = 1, name: str = "weight"
) -> tuple[PackedWeight, Tensor | None]:
    """Reads the weight of a GPTQ module and, with act-order, the order of K that its columns are in. Exact.

    The order is None, or int64 `[K]`: the layer then computes `x[..., order] @ w.T`.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and perhaps `g_idx`; without it k is in group `k // group_size`.
        bits: 2, 4 or 8.
        group_size: of the quantization config; -1 for K. If it does not divide K, scales of a divisor are repeated.
        version: 1 for `checkpoint_format` "gptq" or none, 2 for "gptq_v2".
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a tensor is missing, unknown or does not fit, or the groups of `g_idx` are not equal.
    """
    who = "from_gptq"
    _check(who, bits, version)
    take(who, name, tensors, "qweight", "qzeros", "scales", optional=("g_idx",))
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    check_2d(who, f"{name}.qweight", qweight, torch.int32)
    check_2d(who, f"{name}.qzeros", qzeros, torch.int32)
    check_2d(who, f"{name}.scales", scales, *FLOATS)
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size) if group_size >= 1 else 0
    for part, t, want in (("scales", scales, [groups, n]), ("qzeros", qzeros, [groups, -(-n * bits // 32)])):
        if list(t.shape) != want:
            raise ValueError(
                f"{who}: {name}.{part} must have shape {want} for qweight {list(qweight.shape)} of {bits} bits and"
                f" group_size={group_size}, got {list(t.shape)}"
            )
    zeros = unpack_words(qzeros + _ones(bits) if version == 1 else qzeros, bits, n)  # wraps around as words do
    codes = words_as_bytes(qweight.T)
    order = None if "g_idx" not in tensors else _order(who, name, tensors["g_idx"], k, group_size)
    if order is not None:
        codes = pack_codes(unpack_codes(codes, bits, (n, k))[:, order], bits)
    fitting = group_that_divides(who, name, k, group_size, groups)
    scale, zero = (regroup(t.T, k, group_size, fitting) for t in (scales, zeros))
    weight = PackedWeight(codes, scale.contiguous(), one_or_all(zero, scale.dtype), None, bits, (n, k), fitting)
    return checked(who, weight, name), order


def _order(who: str, name: str, g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """Returns the stable order that brings the members of each group together; None if they are."""
    if g_idx.shape != (k,) or g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{who}: {name}.g_idx must be int32 of shape [{k}], got {g_idx.dtype} {list(g_idx.shape)}")
    plain = torch.arange(k, device=g_idx.device) // group_size
    if torch.equal(g_idx.long(), plain):
        return None
    if not torch.equal(g_idx.long().sort().values, plain):
        raise ValueError(
            f"{who}: {name}.g_idx must name every group {group_size} times, got groups of other sizes;"
            f" a scale for every {group_size} codes cannot hold them"
        )
    return g_idx.long().argsort(stable=True)


def to_gptq(weight: PackedWeight, *, version: int = 1, name: str = "weight") -> dict[str, Tensor]:
    """Writes the tensors of a GPTQ module without act-order. Exact.

    Scales keep their dtype; most readers want fp16.

    Raises:
        ValueError: if N or K is no multiple of 32, the bits are 1, the weight has levels or a zero point that is no
            code, or is 0 in version 1.
    """
    who = "to_gptq"
    zero = integer_zero(who, weight, name)
    _check(who, weight.bits, version)
    weight = repack(weight, CANONICAL)
    (n, k), bits = weight.shape, weight.bits
    if n % 32 or k % 32:
        raise ValueError(f"{who}: N and K of {name} must be multiples of 32, got [{n}, {k}]; pad the weight")
    zeros = zero_tensor(zero, weight.scale)
    if version == 1 and bool((zeros == 0).any()):
        raise ValueError(
            f"{who}: zero points of {name} must be at least 1 in version 1, got 0, which readers disagree about;"
            f" use version=2"
        )
    return {
        "qweight": bytes_as_words(weight.codes).T.contiguous(),
        "qzeros": pack_words(zeros.T, bits) - (_ones(bits) if version == 1 else 0),
        "scales": weight.scale.T.contiguous(),
        "g_idx": (torch.arange(k, device=weight.device) // weight.group_size).int(),
    }
