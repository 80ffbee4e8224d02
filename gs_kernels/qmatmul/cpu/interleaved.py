"""Interleaves the rows of a packed weight for CPUs: words of 16 rows lie side by side, one row to a lane of a register.

A kernel then multiplies codes of 16 rows with the same elements of x at once, whatever the width of a code and the size
of a group, and never sums across lanes. The codes of a word lie so that one shift brings two neighbours to the low ends
of its halves, where one instruction multiplies both with 16-bit numbers and adds. They take the bytes of the canonical
form. The form is built when a weight is first used, and cached (pack/derived.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import codes_of, pack_codes

LANES = 16
WORD = 32  # bits


@dataclass(frozen=True)
class InterleavedWeight:
    """Holds rows in blocks of 16, groups of codes in words.

    Args:
        codes: int32 `[B, G, W, 16]`: a word of each row. Its code j begins at bit `16 * (j % 2) + bits * (j // 2)`.
        grid: fp32 `[B, G, 32]`: the scales of 16 rows, then their zero points. Rows behind the last have scale 0.
        bits: 1, 2, 4 or 8.
        shape: (N, K) of the weight.
        width: codes of one group of the weight, and 0 behind them, in whole words.
    """

    codes: Tensor
    grid: Tensor
    bits: int
    shape: tuple[int, int]
    width: int

    @property
    def groups(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return 4 * (self.codes.numel() + self.grid.numel())

    def padded(self, x: Tensor) -> Tensor:
        """Reshapes rows x `[M, K]` to `[M, G, width]`, 0 where codes are padded."""
        x = x.view(x.shape[0], self.groups, -1)
        return x if x.shape[2] == self.width else pad(x, (0, self.width - x.shape[2]))


def interleave(weight: PackedWeight) -> InterleavedWeight:
    """Builds the row-interleaved form of a weight `[N, K]`; of one with levels from 8-bit codes in even steps.

    Raises:
        UnsuitableError: if the levels are in no such steps.
    """
    if weight.levels is not None:
        weight = _evenly_spaced(weight)
    n, k = weight.shape
    groups, bits = k // weight.group_size, weight.bits
    width = _up(weight.group_size, WORD // bits)
    if weight.layout == CANONICAL and width == weight.group_size:
        packed = weight.codes
    else:
        codes = codes_of(weight).view(n, groups, -1)
        packed = pack_codes(pad(codes, (0, width - weight.group_size)).view(n, -1), bits)
    rows = _up(n, LANES)
    words = _spread(pad(packed, (0, 0, 0, rows - n)).contiguous().view(torch.int32), bits)
    codes = words.view(-1, LANES, groups, width * bits // WORD).permute(0, 2, 3, 1).contiguous()
    scale = weight.scale.detach().float()
    zero = weight.zero.detach().float() if isinstance(weight.zero, Tensor) else torch.full_like(scale, weight.zero)
    grid = pad(torch.stack((scale, zero), 1), (0, 0, 0, 0, 0, rows - n)).view(-1, LANES, 2, groups)
    return InterleavedWeight(codes, grid.permute(0, 3, 2, 1).flatten(2).contiguous(), bits, weight.shape, width)


def _spread(words: Tensor, bits: int) -> Tensor:
    """Moves code j of each int32, which begins at bit `bits * j`, to bit `16 * (j % 2) + bits * (j // 2)`.

    Of four neighbours, the two in the middle change places: codes, then pairs of them, ... up to bytes.
    """
    size = bits
    while size <= 8:
        second = sum(((1 << size) - 1) << at + size for at in range(0, WORD, 4 * size))
        changed = (words >> size).bitwise_xor_(words).bitwise_and_(second)
        words = changed.bitwise_left_shift(size).bitwise_xor_(changed).bitwise_xor_(words)
        size *= 2
    return words


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
