"""Interleaves the rows of a packed weight for CPUs: bytes of 16 rows lie side by side, one row to a lane of a register.

A kernel then multiplies 16 codes with one element of x at once, whatever the width of a code and the size of a group,
and never sums across lanes. The codes take the bytes of the canonical form. The form is built when a weight is first
used, and cached (pack/derived.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import codes_of, pack_codes

LANES = 16
STEP = 8  # codes of a row that a kernel takes at once: whole bytes, whatever their width


@dataclass(frozen=True)
class InterleavedWeight:
    """Holds rows in blocks of 16, groups of codes in steps of 8; at least two of each, which compiled code relies on.

    Args:
        codes: uint8 `[B, G, S, bits * 16]`: byte r of step s of group g of row `16 * b + l` is at `16 * r + l`.
        grid: fp32 `[B, G, 32]`: the scales of 16 rows, then their zero points. Rows behind the last have scale 0.
        bits: 1, 2, 4 or 8.
        shape: (N, K) of the weight.
        width: codes of one group of the weight, and 0 behind them. One scale per row: two groups, half the width each.
    """

    codes: Tensor
    grid: Tensor
    bits: int
    shape: tuple[int, int]
    width: int

    @cached_property
    def groups(self) -> int:
        """Counts the groups of the weight itself."""
        return self.codes.shape[1] * self.codes.shape[2] * STEP // self.width

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.grid.numel()

    def steps(self, x: Tensor) -> Tensor:
        """Reshapes rows x `[M, K]` to `[M, G, S, 8]`, 0 where codes are padded."""
        x = x.view(x.shape[0], self.groups, -1)
        if x.shape[2] != self.width:
            x = pad(x, (0, self.width - x.shape[2]))
        return x.view(x.shape[0], *self.codes.shape[1:3], STEP)


def interleave(weight: PackedWeight) -> InterleavedWeight:
    """Builds the row-interleaved form of a weight `[N, K]`; of one with levels from 8-bit codes in even steps.

    Raises:
        UnsuitableError: if the levels are in no such steps.
    """
    if weight.levels is not None:
        weight = _evenly_spaced(weight)
    n, k = weight.shape
    groups = k // weight.group_size
    halves = 2 if groups == 1 else 1
    width = _up(max(weight.group_size, 2 * STEP * halves), STEP * halves)
    if weight.layout == CANONICAL and width == weight.group_size:
        packed = weight.codes
    else:
        codes = codes_of(weight).view(n, groups, -1)
        packed = pack_codes(pad(codes, (0, width - weight.group_size)).view(n, -1), weight.bits)
    rows = max(_up(n, LANES), 2 * LANES)
    split = pad(packed, (0, 0, 0, rows - n)).view(-1, LANES, groups * halves, width // (STEP * halves), weight.bits)
    codes = split.permute(0, 2, 3, 4, 1).flatten(3).contiguous()
    scale = weight.scale.detach().float()
    zero = weight.zero.detach().float() if isinstance(weight.zero, Tensor) else torch.full_like(scale, weight.zero)
    grid = pad(torch.stack((scale, zero), 1), (0, 0, 0, 0, 0, rows - n)).view(-1, LANES, 2, groups)
    grid = grid.permute(0, 3, 2, 1).flatten(2).repeat(1, halves, 1)
    return InterleavedWeight(codes, grid.contiguous(), weight.bits, weight.shape, width)


def _evenly_spaced(weight: PackedWeight) -> PackedWeight:
    """Returns a weight of 8-bit codes with the same values, whose levels are halves, as those of 4-bit floats are."""
    assert weight.levels is not None
    twice = 2 * weight.levels.detach()
    zero = -twice.min()  # the smallest: what codes are larger than values costs digits of their sums
    if not bool(((twice == twice.round()) & (twice + zero < 256)).all()):
        raise UnsuitableError("its levels are no whole or half numbers, or too far apart for 8 bits")
    codes = (twice + zero).to(torch.uint8)[codes_of(weight).int()]
    scale = weight.real_scale() * 0.5
    return replace(
        weight, codes=codes, scale=scale, zero=float(zero), levels=None, divisor=None, bits=8, layout=CANONICAL
    )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def interleaved(weight: PackedWeight) -> InterleavedWeight:
    """Returns the row-interleaved form of a weight, built by the first call; see `derived`.

    Raises:
        UnsuitableError: as `derived`.
    """
    return derived(weight, "row-interleaved", interleave)
