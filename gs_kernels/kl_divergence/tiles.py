"""Chooses how many logits of a row a program reads at a time."""

from __future__ import annotations

from typing import NamedTuple

from gs_kernels.fake_quant.tiles import power_of_two

WIDEST = 4096  # logits: 16 for each thread of 8 warps


class Tile(NamedTuple):
    """Holds the logits of a turn, and the warps that read them."""

    block_v: int
    warps: int


def choose_tile(v: int) -> Tile:
    """Returns the tile for rows of v logits."""
    block = power_of_two(v, WIDEST)
    return Tile(block, max(1, min(8, block // 512)))
