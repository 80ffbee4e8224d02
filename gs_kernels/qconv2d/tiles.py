"""In which tiles a convolution with a packed weight is computed: pure Python, from a few rules."""

from __future__ import annotations

from dataclasses import replace

from gs_kernels.qmatmul.tiles import DENSE, Plan

FEW_PIXELS = 16
SOME_PIXELS = 256  # in fp32, or with a table of levels, kernels do only so many: others are dequantised once

FEW = Plan(scale_parts=True, block_m=FEW_PIXELS)
# by compute capability, as RULES of gs_kernels/qmatmul/tiles.py
TILES = {
    90: (Plan(block_m=128, warps=8, stages=3), Plan(block_m=64), Plan(block_m=32)),
    80: (Plan(block_m=64, warps=8, stages=3), Plan(block_m=32)),
}
INT8_FEW = Plan(block_m=FEW_PIXELS)


def choose_plan(
    m: int,
    n: int,
    k: int,
    groups: int,
    *,
    channels: int,
    x_bits: int,
    levels: bool,
    sm: int,
    sm_count: int,
    int8_group: int = 0,
    splits: bool = True,
) -> Plan:
    """The plan of m pixels of y, each of `groups` times n channels of k products.

    The largest tile of which every processor gets one, for it dequantises least; else the smallest, and parts of K.
    Not timed yet.

    Args:
        channels: of x in a group; such that are no multiple of 8 are gathered by many loads.
        x_bits: of an element of x: 32, 16 or 8.
        levels: whether the grid of the weight is a table.
        sm: 90 for compute capability 9.0.
        sm_count: number of processors.
        int8_group: of 8-bit x, elements per scale, 0 for one group. Groups that end inside a block take products of
            their own: registers hold only few pixels.
        splits: whether sums over parts of K add up to the same.
    """
    if (levels or x_bits == 32) and m > SOME_PIXELS:
        return DENSE
    plans = TILES[90 if sm >= 90 else 80]
    if m <= FEW_PIXELS:
        plans = (INT8_FEW if x_bits == 8 else FEW,)
    elif x_bits == 32 or int8_group % 128 != 0 or channels % 8 != 0:
        plans = plans[-1:]
    wide = 64 if n <= 64 or x_bits == 32 else 128
    tiles = 0
    for plan in plans:
        tiles = -(-m // plan.block_m) * groups * -(-n // wide)
        if tiles >= sm_count:
            break
    # eight warps share 128 x 128 sums; half of them is enough for half
    warps = plan.warps if wide == 128 else 4
    split = max(1, min(2 * sm_count // tiles, -(-k // 128) // 4, 8))
    return replace(plan, block_n=wide, warps=warps, split_k=split if splits else 1)


def depthwise_tile(o: int) -> tuple[int, int, int]:
    """Pixels, channels and warps of a tile of a convolution of single channels, o of them."""
    block_n = 16
    while block_n < o and block_n < 64:
        block_n *= 2
    return 2048 // block_n, block_n, 4
