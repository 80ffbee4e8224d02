"""A packed weight as a CPU reads it fastest: a byte of each of 16 rows side by side, a row to a lane of a register.

A kernel then multiplies 16 codes with one element of x at once, whatever the width of a code and the size of a group,
and never sums across lanes. The codes take the bytes of the canonical form; they are made when a weight is first used,
kept while its codes live, and made again when one of its tensors has changed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import codes_of, pack_codes

logger = logging.getLogger(__name__)

LANES = 16
STEP = 8  # codes of a row that a kernel takes at once: whole bytes, whatever their width


class UnsuitableError(RuntimeError):
    """Products with lanes cannot run here: plain tensor operations will."""


@dataclass(frozen=True)
class InterleavedWeight:
    """Rows in blocks of 16, groups of codes in steps of 8; at least two of each, which compiled code relies on.

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
        """Groups of the weight itself."""
        return self.codes.shape[1] * self.codes.shape[2] * STEP // self.width

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.grid.numel()

    def steps(self, x: Tensor) -> Tensor:
        """Rows `[M, K]` of x as `[M, G, S, 8]`, 0 where codes are padded."""
        x = x.view(x.shape[0], self.groups, -1)
        if x.shape[2] != self.width:
            x = pad(x, (0, self.width - x.shape[2]))
        return x.view(x.shape[0], *self.codes.shape[1:3], STEP)


def make_lanes(weight: PackedWeight) -> InterleavedWeight:
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


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def interleaved(weight: PackedWeight) -> InterleavedWeight:
    """The lanes of a weight, made when first asked for; see `kept`.

    Raises:
        UnsuitableError: as `kept`.
    """
    return kept(weight, "lanes", make_lanes)


T = TypeVar("T")

# by storage and offset of the codes, and kind: what was true of the weight, owners of its tensors, what was made
_kept: dict[tuple[int, int, Hashable], tuple[list[Any], list[Any], Any]] = {}
_said = False


def kept(weight: PackedWeight, kind: Hashable, make: Callable[[PackedWeight], T]) -> T:
    """What `make` makes of a weight, kept by kind while the codes live, and made again when a tensor has changed.

    Changes of its tensors through `.data` or numpy are not seen: do not make them.

    Raises:
        UnsuitableError: if a tensor does not count its changes, as those made in inference mode.
    """
    storage = weight.codes.untyped_storage()
    key = (id(storage), int(weight.codes.storage_offset()), kind)
    state: list[Any] = [weight.bits, weight.shape, weight.group_size, weight.layout]
    owners = []
    for t in (weight.codes, weight.scale, weight.zero, weight.levels):
        if not isinstance(t, Tensor):
            state.append(t)
        elif t.is_inference():
            _say_untracked()
            raise UnsuitableError("a tensor was made in inference mode")
        else:
            state += (t._version, t.storage_offset(), t.stride(), t.dtype)
            owners.append(t.untyped_storage())
    found = _kept.get(key)
    if found is not None and found[0] == state:
        for ref, owner in zip(found[1], owners, strict=True):
            if ref() is not owner:
                break
        else:
            return found[2]
    # ordinary tensors even in inference mode: compiled code would be compiled again for others
    with torch.inference_mode(False), torch.no_grad():
        made = make(weight)
    # a storage that dies takes its entry along, before another can have its address
    refs = [weakref.ref(storage, lambda _: _kept.pop(key, None)), *map(weakref.ref, owners[1:])]
    _kept[key] = (state, refs, made)
    return made  # type: ignore[no-any-return]


def _say_untracked() -> None:
    global _said
    if not _said:
        _said = True
        logger.info(
            "qmatmul dequantises a weight in every call: its tensors were made in inference mode and do not tell when"
            " they change; load it outside"
        )
