"""Chooses the tiles of a convolution with a packed weight: pure Python, from a table or a few rules."""

from __future__ import annotations

from dataclasses import replace

from gs_kernels.qmatmul.tiles import DENSE, Plan, rule_of
from gs_kernels.tuning.tables import tuned

FEW_PIXELS = 16
# in fp32, with a table of levels, or where pixels are gathered by many loads, float kernels do only so many: weights of
# others are dequantized once
SOME_PIXELS = 256

FEW = Plan(scale_parts=True, block_m=FEW_PIXELS)
# by compute capability, as RULES of gs_kernels/qmatmul/tiles.py
TILES = {
    90: (Plan(block_m=128, warps=8, stages=3), Plan(block_m=64), Plan(block_m=32)),
    80: (Plan(block_m=64, warps=8, stages=3), Plan(block_m=32)),
}
INT8_FEW = Plan(block_m=FEW_PIXELS)
PROGRAMS = 2  # that an SM should have to do, for split-K


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
    """Chooses the plan of m pixels of y, each of `groups` times n channels of k products: by a table, else by rules.

    Args:
        channels: of x in a group; such that are no multiple of 8 are gathered by many loads, and have no table.
        x_bits: of an element of x: 32, 16 or 8.
        levels: whether the grid of the weight is a table.
        sm: 90 for compute capability 9.0.
        sm_count: number of processors.
        int8_group: of 8-bit x, elements per scale, 0 for one group. Groups that end inside a block take products of
            their own: registers hold only few pixels.
        splits: whether partial sums over K add up to the same.
    """
    tile = None
    if x_bits < 32 and not levels and int8_group == 0 and channels % 8 == 0:
        sizes = {"n": n, "k": k, "groups": groups, "channels": channels, "x_bits": x_bits}
        tile = tuned("qconv2d", (sm, sm_count), m, **sizes)
    if tile is not None:
        rule = rule_of(tile)
        plan, programs = rule.plan, rule.per_sm
    elif (levels or x_bits == 32 or (x_bits == 16 and channels % 8 != 0)) and m > SOME_PIXELS:
        return DENSE
    else:
        programs = PROGRAMS
        plan = default_plan(
            m, n, groups, channels=channels, x_bits=x_bits, sm=sm, sm_count=sm_count, int8_group=int8_group
        )
    if plan.dense:
        return DENSE
    split = max(1, min(programs * sm_count // _tiles(plan, m, n, groups), -(-k // 128) // 4, 8))
    return replace(plan, split_k=split if splits else 1)


def _tiles(plan: Plan, m: int, n: int, groups: int) -> int:
    return -(-m // plan.block_m) * groups * -(-n // plan.block_n)


def default_plan(
    m: int, n: int, groups: int, *, channels: int, x_bits: int, sm: int, sm_count: int, int8_group: int
) -> Plan:
    """Chooses without a table, and before K is split, the largest tile of which every processor gets one, for it
    dequantizes least; else the smallest. Not timed yet."""
    # sm_120 multiplies as sm_80 does, and has no more shared memory than sm_89
    plans = TILES[90 if 90 <= sm < 120 else 80]
    if m <= FEW_PIXELS:
        plans = (INT8_FEW if x_bits == 8 else FEW,)
    elif x_bits == 32:
        plans = (replace(plans[-1], stages=3),)  # of elements twice as large, four do not fit sm_89
    elif int8_group % 128 != 0 or channels % 8 != 0:
        plans = plans[-1:]
    wide = 64 if n <= 64 or x_bits == 32 else 128
    plans = tuple(replace(plan, block_n=wide) for plan in plans)
    plan = next((plan for plan in plans if _tiles(plan, m, n, groups) >= sm_count), plans[-1])
    # eight warps share 128 x 128 sums; half of them is enough for half
    return plan if wide == 128 else replace(plan, warps=4)


def depthwise_tile(o: int) -> tuple[int, int, int]:
    """Returns pixels, channels and warps of a tile of a convolution of single channels, o of them."""
    block_n = 16
    while block_n < o and block_n < 64:
        block_n *= 2
    return 2048 // block_n, block_n, 4
