"""Shares what the formats need: int32 words of fields, zero points that must be integers, groups of another size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gs_kernels.pack.checks import check_packed, check_packed_values, dtype_name
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import pack_codes, unpack_codes

GROUP_MIN = 16  # smaller groups than a format's own are not made up to fit it: their scales would outweigh the codes


def words_as_bytes(words: Tensor) -> Tensor:
    """Views int32 `[R, W]` as uint8 `[R, 4 * W]`, low byte first: words of 32 / bits fields are canonical bytes."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def bytes_as_words(codes: Tensor) -> Tensor:
    """Views uint8 `[R, B]` as int32 `[R, ceil(B / 4)]`, with bytes of 0 behind."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(codes.shape[0], -1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks the first `count` fields of each row, uint8 `[R, count]`."""
    return unpack_codes(words_as_bytes(words)[:, : -(-count * bits // 8)], bits, (words.shape[0], count))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    return bytes_as_words(pack_codes(codes, bits))


def take(who: str, name: str, tensors: Mapping[str, Tensor], *needed: str, optional: tuple[str, ...] = ()) -> None:
    """Raises unless all needed tensors are there, and nothing that would be lost."""
    missing = sorted(set(needed) - set(tensors))
    unknown = sorted(set(tensors) - set(needed) - set(optional))
    if missing:
        raise ValueError(f"{who}: {name} must have {', '.join(needed)}, got no {', '.join(missing)}")
    if unknown:
        raise ValueError(
            f"{who}: {name} must have {', '.join(needed)} and at most {', '.join(optional) or 'nothing else'},"
            f" got {', '.join(unknown)} too; what is left out would be lost, so take it out first"
        )


def check_2d(who: str, name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        got = dtype_name(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{who}: {name} must be {' / '.join(map(dtype_name, dtypes))}, got {got}")
    if t.dim() != 2 or t.numel() == 0:
        raise ValueError(f"{who}: {name} must have two axes and no empty one, got {list(t.shape)}")


def integer_zero(who: str, weight: PackedWeight, name: str) -> int | Tensor:
    """Returns the zero points as one integer or as uint8 `[N, G]`; raises if they are no codes."""
    check_packed(who, weight, name)
    if weight.levels is not None:
        raise ValueError(f"{who}: {name} must have evenly spaced levels, got a table of {len(weight.levels)} levels")
    zero = (
        weight.zero
        if isinstance(weight.zero, Tensor)
        else torch.tensor(float(weight.zero), dtype=torch.float32, device=weight.codes.device)
    )
    top = 2**weight.bits - 1
    wrong = (zero != zero.round()) | (zero < 0) | (zero > top) | zero.isnan()
    if bool(wrong.any()):
        raise ValueError(
            f"{who}: zero points of {name} must be integers in 0..{top}, got {float(zero[wrong].flatten()[0]):.6g};"
            f" this format has no other, so keep the weight in the canonical format or quantize it on such a grid"
        )
    return zero.to(torch.uint8) if isinstance(weight.zero, Tensor) else int(weight.zero)


def zero_tensor(zero: int | Tensor, like: Tensor) -> Tensor:
    """Returns zero points as uint8 `[N, G]`."""
    return zero if isinstance(zero, Tensor) else torch.full_like(like, zero, dtype=torch.uint8)


def one_or_all(zero: Tensor, dtype: torch.dtype) -> Tensor | float:
    """Returns one number if it is the same everywhere, as in symmetric checkpoints that store it nevertheless."""
    return float(zero[0, 0]) if bool((zero == zero[0, 0]).all()) else zero.to(dtype).contiguous()


def checked(who: str, weight: PackedWeight, name: str) -> PackedWeight:
    check_packed(who, weight, name)
    check_packed_values(who, weight, name)
    return weight


def group_that_divides(who: str, name: str, k: int, group_size: int, groups: int) -> int:
    """Returns group_size if it divides K; else K for one group, or a divisor of both, whose scales are repeated."""
    if groups == 1:
        return k
    if k % group_size == 0:
        return group_size
    common = math.gcd(k, group_size)
    if common < GROUP_MIN:
        raise ValueError(
            f"{who}: K of {name} must be a multiple of its group size or share a divisor >= {GROUP_MIN} with it,"
            f" got K={k}, group_size={group_size}; pad K before quantizing"
        )
    return common


def regroup(t: Tensor, k: int, old: int, new: int) -> Tensor:
    """Repeats `[N, ceil(K / old)]` to `[N, ceil(K / new)]`, where every new group lies in an old one."""
    if old == new or t.shape[1] == -(-k // new):
        return t
    starts = torch.arange(0, k, new, device=t.device)
    return t[:, starts // old]
