"""Chooses what a turn of the kernel that scores candidates multiplies."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Sizes of a product: rows, outputs and inputs of a turn."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def choose_tile(dtype: torch.dtype) -> Tile:
    """Returns the tile for a dtype. fp32 is not multiplied by tensor cores."""
    if dtype == torch.float32:
        return Tile(32, 64, 16, 4, 2)
    return Tile(64, 256, 32, 8, 3)
