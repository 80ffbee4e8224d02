"""Makes the forms of a packed weight that 8-bit convolutions on a CPU multiply with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import codes_of
from gs_kernels.qconv2d.checks import LARGEST_GROUP
from gs_kernels.qconv2d.geometry import ConvGeometry

LANES = 16
# codes of one sum that no zero point of the weight adds to: 2 * 255 * 128 times that is below 2**31
LARGEST_SYMMETRIC = 1 << 15
PAIRS, SHORTS, QUADS = 0, 1, 2  # forms of products, as int8.h has them
SHORT = (1 << 15) - 1  # the largest sum of products in 16 bits


@dataclass(frozen=True)
class Int8Weight:
    """Holds a weight as int8 `[O, K]`, and the part of its zero points that int8 codes cannot hold.

    Sums are of `2 * (code - zero)`, so that zero points of half a step are whole numbers.

    Args:
        codes: `code - zero`; doubled, with `2 * zero` rounded, where a zero point is no whole number; for 8-bit weights
            `code - 128`.
        twice: factor of the sums of `codes`: 2, and 1 where they are doubled.
        zero2: fp32 `[O, G]`, added to the doubled codes of 8-bit weights: `256 - 2 * zero`; None if it is 0 everywhere.
        fraction: fp32 `[O, G]`, the zero point less its nearest half step; None if it is 0 everywhere.
        group_size: codes that share a scale.
        scale: fp32 `[O, G]`.
    """

    codes: Tensor
    twice: int
    zero2: Tensor | None
    fraction: Tensor | None
    group_size: int
    scale: Tensor


def make_int8_weight(weight: PackedWeight) -> Int8Weight:
    """Makes the int8 form of a weight.

    Raises:
        UnsuitableError: if zero points lie so far off the grid that int8 does not hold the codes less them, or a group
            is so large that int32 does not hold its sums.
    """
    weight = _joined(weight)
    codes = codes_of(weight)
    size = weight.group_size
    zero = (
        weight.zero.float()
        if isinstance(weight.zero, Tensor)
        else torch.full_like(weight.scale, weight.zero, dtype=torch.float32)
    )
    near2 = torch.round(2 * zero)
    rest = zero - near2 / 2
    zero2: Tensor | None = None
    twice = 2
    if weight.bits == 8:
        centered, zero2 = (codes ^ 128).view(torch.int8), 256 - near2
    elif bool((near2 < 2 ** (weight.bits + 1) - 128).any() | (near2 > 128).any()):
        raise UnsuitableError("zero points lie far off the grid")
    elif bool((near2 % 2).any()):
        twice = 1
        centered = codes.view(torch.int8) * 2 - near2.to(torch.int8).repeat_interleave(size, 1)
    else:
        centered = codes.view(torch.int8) - (near2 / 2).to(torch.int8).repeat_interleave(size, 1)
    zero2 = zero2 if zero2 is not None and bool(zero2.any()) else None
    fraction = rest if bool(rest.any()) else None
    if size > (LARGEST_SYMMETRIC if zero2 is None else LARGEST_GROUP):
        raise UnsuitableError(f"no int32 holds the sums of {size:,} products")
    return Int8Weight(centered, twice, zero2, fraction, size, weight.scale.float())


def _joined(weight: PackedWeight) -> PackedWeight:
    """Joins groups that are one scale in memory: they are parts of one sum, which is rounded once."""
    parts = weight.scale.shape[1]
    if parts == 1 or weight.scale.stride(1) != 0:
        return weight
    zero = weight.zero[:, :1] if isinstance(weight.zero, Tensor) else weight.zero
    return replace(weight, scale=weight.scale[:, :1], zero=zero, group_size=weight.group_size * parts)


@dataclass(frozen=True)
class Panels:
    """Holds the codes as int8.cpp takes them.

    Args:
        words: int32 `[groups, panels, words of a panel, 16]`: 2 codes of 16 bits or 4 bytes each, of 16 rows; of a
            depthwise convolution `[planes, S, C]`, C padded to a multiple of 16.
        runs: int64 `[runs, 6]`: r, s, first channel, codes, words, and whether a group of the weight ends.
        form: PAIRS, SHORTS or QUADS.
        joined: how many products SHORTS add in 16 bits.
        code_sums: int32 `[G, O]`.
    """

    words: Tensor
    runs: Tensor
    form: int
    joined: int
    code_sums: Tensor


def arrange(weight: PackedWeight, geometry: ConvGeometry, forms: int) -> tuple[Int8Weight, Panels]:
    """Makes what the C++ takes of a weight, by the best of some forms of products, of which forms has the bits.

    Of the first the codes take no memory: every one is the same.

    Raises:
        UnsuitableError: as `make_int8_weight`.
    """
    int8_weight = make_int8_weight(weight)
    codes = int8_weight.codes
    depthwise = geometry.groups == len(codes) == codes.shape[1] // geometry.taps * geometry.groups
    make = make_planes if depthwise and int8_weight.scale.shape[1] == 1 else make_panels
    panels = make(int8_weight, geometry, forms)
    return replace(int8_weight, codes=codes[:1, :1].clone().expand(codes.shape)), panels


def make_panels(weight: Int8Weight, geometry: ConvGeometry, forms: int) -> Panels:
    """Arranges the codes for products of the best of some forms, of which forms has the bits."""
    channels = weight.codes.shape[1] // geometry.taps
    runs = _runs_of(geometry, channels, weight.group_size)
    form, joined = _form_of(weight.codes, runs, forms)
    in_word = 2 if form == PAIRS else 4
    parts, at = [], 0
    for run in runs:
        run[4] = -(-run[3] // (in_word * joined)) * joined
        parts.append(pad(weight.codes[:, at : at + run[3]], (0, run[4] * in_word - run[3])))
        at += run[3]
    rows = torch.cat(parts, 1)
    rows = rows.to(torch.int16) if form == PAIRS else rows
    by_group = rows.view(geometry.groups, -1, rows.shape[1])
    padded = pad(by_group, (0, 0, 0, -by_group.shape[1] % LANES)).contiguous().view(torch.int32)
    words = padded.view(geometry.groups, -1, LANES, padded.shape[2]).transpose(2, 3).contiguous()
    sums = weight.codes.unflatten(1, (-1, weight.group_size)).sum(2, dtype=torch.int32)
    return Panels(words, torch.tensor(runs, device="cpu"), form, joined, sums.t().contiguous())


def make_planes(weight: Int8Weight, geometry: ConvGeometry, forms: int) -> Panels:
    """Arranges the codes `[C, taps]` of a depthwise convolution: words of 2 or 4 taps along the height."""
    form = QUADS if forms >> QUADS & 1 else PAIRS
    in_word = 2 if form == PAIRS else 4
    taps = weight.codes.view(-1, geometry.r, geometry.s)
    taps = taps.to(torch.int16) if form == PAIRS else taps
    padded = pad(taps, (0, 0, 0, -geometry.r % in_word, 0, -len(taps) % LANES))
    planes = padded.view(len(padded), -1, in_word, geometry.s).permute(1, 3, 0, 2)  # [planes, S, C, codes of a word]
    words = planes.flatten().view(torch.int32).view(planes.shape[:3])
    sums = weight.codes.sum(1, dtype=torch.int32)[None]
    return Panels(words, torch.empty(0, 6, dtype=torch.int64, device="cpu"), form, 1, sums)


def _runs_of(geometry: ConvGeometry, channels: int, group_size: int) -> list[list[int]]:
    """Lists codes that are neighbours in a row of the image: a row of taps, or a tap, cut where groups end."""
    joined = geometry.s if geometry.dilation_w == 1 else 1  # taps that are neighbours
    length, runs, done = joined * channels, [], 0
    for r in range(geometry.r):
        for s in range(0, geometry.s, joined):
            at = 0
            while at < length:
                count = min(length - at, group_size - done % group_size)
                done += count
                runs.append([r, s + at // channels, at % channels, count, 0, int(done % group_size == 0)])
                at += count
    return runs


def _form_of(codes: Tensor, runs: list[list[int]], forms: int) -> tuple[int, int]:
    """Returns the form of products, and how many of SHORTS may be added: those that 16 bits hold for any x."""
    if forms >> QUADS & 1:
        return QUADS, 1
    if forms >> SHORTS & 1:
        largest, at = 0, 0
        for run in runs:
            part = pad(codes[:, at : at + run[3]], (0, run[3] % 2)).to(torch.int16).abs_()
            largest = max(largest, int(part.unflatten(1, (-1, 2)).sum(2, dtype=torch.int32).max()))
            at += run[3]
        words = [-(-run[3] // 4) for run in runs]
        for joined in (4, 2, 1):
            wasted = sum(-n % joined for n in words)
            if 255 * largest * joined <= SHORT and 8 * wasted <= sum(words):
                return SHORTS, joined
    return PAIRS, 1
