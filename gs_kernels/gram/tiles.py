"""Chooses what a program of the kernel that sums products of columns holds."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gs_kernels.fake_quant.tiles import power_of_two

LARGE = 128  # columns, where there are enough of them for a tile on every processor
MANY = 1024  # columns up to which tiles are halved: 64 columns make 136 tiles of them


class Tile(NamedTuple):
    """block_k: columns, on both sides of the product. block_t: tokens in a turn of the loop."""

    block_k: int
    block_t: int
    warps: int
    stages: int


def choose_tile(k: int, dtype: torch.dtype, cross: bool) -> Tile:
    """Returns the tile for K columns of a dtype; cross: of two inputs, both of which wait in shared memory.

    fp32 is not multiplied by tensor cores: its tile fits registers.
    """
    small = k <= MANY or dtype == torch.float32
    block_k = power_of_two(max(k, 16), LARGE // 2 if small else LARGE)
    if dtype == torch.float32:
        return Tile(block_k, 16, 4, 2)
    return Tile(block_k, 32, 8 if block_k == LARGE else 4, 3 if cross else 4)
