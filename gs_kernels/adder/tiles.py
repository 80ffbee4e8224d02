"""Chooses the tiles of L1 products: pixels times channels whose sums a program holds in registers."""

from __future__ import annotations

from typing import NamedTuple

from gs_kernels.fake_quant.tiles import power_of_two


class Tile(NamedTuple):
    """Holds the pixels and channels of a program, its warps, and the terms whose operands are on their way at once."""

    block_m: int
    block_n: int
    warps: int
    unroll: int


def _pixels(m: int, widest: int) -> int:
    """Returns the largest block that leaves little of its programs without pixels."""
    covered = {size: -(-m // size) * size for size in (widest >> i for i in range(widest.bit_length() - 4))}
    least = min(covered.values())
    return next(size for size, pixels in covered.items() if pixels <= 1.15 * least)


def choose_tile(m: int, n: int) -> Tile:
    """Returns the tile for m pixels that lie side by side and n channels: 64 sums a thread."""
    block_m, block_n = _pixels(m, 256), max(8, power_of_two(n, 16))
    return Tile(block_m, block_n, max(1, block_m * block_n // 2048), 8)


def choose_gradient_tile(m: int) -> Tile:
    """Returns the tile for m pixels of x: 32 sums a thread, which holds as many numbers of x."""
    block_m = _pixels(m, 256)
    return Tile(block_m, 8, max(1, block_m // 128), 8)
