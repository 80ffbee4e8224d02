"""Chooses how a product with a packed weight is computed, and in which tiles: pure Python, from a few rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gs_kernels.tuning.tables import LAST, tuned


@dataclass(frozen=True)
class Plan:
    """Says how a product is tiled. dense: dequantize once and multiply as a float layer does; the rest is then unused.

    scale_parts: scales on the product of a block, where groups allow, not on the weights.
    split_k: at most so many programs share one tile of y, of 8-bit x and of convolutions.
    shares: so many programs take equal shares of the blocks along K of all tiles, of float x, and there are as many
        blocks or more; 0: each does a tile.
    per_sm: how many of these programs are for one processor, a divisor of shares.
    early: whether what adds the parts of shares is launched while they are made, and waits on the GPU.
    """

    dense: bool = False
    scale_parts: bool = False
    block_m: int = 16
    block_n: int = 128
    split_k: int = 1
    shares: int = 0
    per_sm: int = 1
    early: bool = False
    warps: int = 4
    stages: int = 4

    def partials(self, blocks: int) -> int:
        """Counts the partial sums that `blocks` blocks along K are split into, none of them empty."""
        turns = -(-blocks // self.split_k)
        return -(-blocks // turns)

    def parts(self, tiles: int, blocks: int) -> int:
        """Counts the programs, at most, whose shares meet in one of `tiles` tiles of `blocks` blocks along K."""
        return min((blocks - 1) * self.shares // (tiles * blocks) + 2, blocks)


@dataclass(frozen=True)
class Rule:
    """Holds the plan of products with at most `rows` rows. per_sm: how many programs an SM should have to do.

    Where a tile each leaves processors idle, K is split. 0: never. wider: a plan with more rows a tile, which
    dequantizes less, taken where that is done sooner.
    """

    rows: int
    plan: Plan
    per_sm: int = 1
    wider: Plan | None = None


DENSE = Plan(dense=True)
FEW_ROWS = 16  # in fp32, or with a table of levels, kernels do only products with so few rows, bound by memory
FEW = Plan(scale_parts=True, block_m=FEW_ROWS)

# chosen by machine code: no spills, wgmma fed from registers and in flight, most programs per SM. Not timed yet
SOME_ROWS = (Rule(32, Plan(block_m=32), per_sm=2), Rule(64, Plan(block_m=64), per_sm=2))
MANY = Plan(block_m=128, warps=8, stages=3)
# above, dequantizing once takes less than a tenth of the product, which a library then does
MORE_ROWS = (*SOME_ROWS, Rule(2048, MANY, wider=replace(MANY, block_m=256)))
RULES: dict[int, tuple[Rule, ...]] = {
    # 99 KiB of shared memory hold no tile of 256 rows
    120: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *SOME_ROWS, Rule(512, MANY)),
    100: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *MORE_ROWS),
    90: (Rule(FEW_ROWS, FEW, per_sm=2), *MORE_ROWS),
    80: (
        Rule(FEW_ROWS, FEW, per_sm=2),
        Rule(32, Plan(block_m=32), per_sm=2),
        Rule(512, Plan(block_m=64, warps=8, stages=3)),
    ),
}


def choose_plan(
    m: int,
    n: int,
    k: int,
    bits: int,
    *,
    x_bits: int,
    levels: bool,
    sm: int,
    sm_count: int,
) -> Plan:
    """Chooses the plan of x `[m, k]` times a weight `[n, k]`; compares m only, so that a symbol is bounded, not fixed.

    Args:
        bits: of the weight.
        x_bits: of an element of x, 16 or 32.
        levels: whether the grid of the weight is a table.
        sm: 90 for compute capability 9.0; the rules of the nearest one below are taken, else of the lowest.
        sm_count: number of processors.
    """
    has_table = x_bits == 16 and not levels
    tile = tuned("qmatmul", (sm, sm_count), m, n=n, k=k, bits=bits) if has_table else None
    rule = default_rule(m, sm) if tile is None else rule_of(tile)
    if rule.plan.dense or ((levels or x_bits == 32) and not m <= FEW_ROWS):
        return DENSE
    # in fp32 a tile of weights takes twice the registers
    plan = rule.plan if x_bits == 16 else replace(rule.plan, block_n=rule.plan.block_n // 2)
    plan, cost = _share(plan, rule.per_sm, m, n, k, sm, sm_count)
    # beside 256 rows of sums, 8-bit weights in small groups do not fit the registers
    if rule.wider is not None and bits < 8:
        wider, cost_of_wider = _share(rule.wider, rule.per_sm, m, n, k, sm, sm_count)
        if cost_of_wider < cost:
            return wider
    return plan


def default_rule(m: int, sm: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    rules = RULES[max((least for least in RULES if least <= sm), default=min(RULES))]
    return next((rule for rule in rules if m <= rule.rows), Rule(LAST, DENSE))


def rule_of(tile: dict[str, Any]) -> Rule:
    """Turns a tile of a table into a rule for any number of rows."""
    return Rule(LAST, Plan(**{name: v for name, v in tile.items() if name != "programs"}), tile["programs"])


SHORTEST = 3  # blocks of a share: what a pipeline of four stages loads before it multiplies
# a part of a tile is written, and read again, through L2; half of that is behind the products of others. In blocks of
# weights, for each row of a tile: H100, some 24 bytes a clock and SM, where a block of 128 x 128 takes 500 clocks
PART = 1 / 32
EARLY_SM = 90  # the first compute capability with programmatic dependent launches
# what dequantizing a block of 128 x 128 weights takes and products do not hide, in rows of products: half of the 420 to
# 480 clocks in which an H100 issues its instructions, where a row takes 8
UNHIDDEN = 28
MOST_TILES = 8  # of rows: with more, each is a tile


def _share(plan: Plan, per_sm: int, m: int, n: int, k: int, sm: int, sm_count: int) -> tuple[Plan, float]:
    """Has programs share the blocks of all tiles evenly, where processors are done sooner than with a tile each.

    Returns the plan, and what it costs the busiest processor, in rows of blocks.
    """
    tiles_m = next((count for count in range(1, MOST_TILES + 1) if m <= count * plan.block_m), 0)
    tiles = tiles_m * -(-n // plan.block_n)
    per_sm, shares, cost = share(tiles, -(-k // 128), plan.block_m, per_sm, sm_count)
    plan = replace(plan, shares=shares, per_sm=per_sm, early=shares > 0 and sm >= EARLY_SM)
    return plan, cost * (plan.block_m + UNHIDDEN) if tiles else math.inf


@lru_cache(maxsize=4096)
def share(tiles: int, blocks: int, rows: int, per_sm: int, sm_count: int) -> tuple[int, int, float]:
    """Returns how many programs an SM should get, how many there are in all, 0 if each does a tile, and what it costs.

    Time is counted in blocks of the busiest SM; with shares, that is what all have, and what parts of tiles cost.

    Args:
        blocks: of a tile, along K.
        rows: of a tile.
        per_sm: how many programs an SM should get at most; fewer, if that is what pays.
    """
    work, whole = tiles * blocks, -(-tiles // sm_count) * blocks
    for each in range(per_sm, 0, -1):
        programs = min(each * sm_count, work // SHORTEST) if each == 1 else each * sm_count
        if work < SHORTEST * programs or programs == 0:
            continue
        parts = (programs + tiles) / min(programs, sm_count) * rows * PART
        cost = -(-work // min(programs, sm_count)) + parts
        if cost < whole:
            return each, programs, cost
    return 1, 0, whole


def _split(plan: Plan, programs: int, m: int, n: int, k: int, most: int) -> Plan:
    """Splits K into so many programs, if each has four turns to fill its pipeline."""
    tiles = -(-n // plan.block_n) * (1 if m <= plan.block_m else -(-m // plan.block_m))
    return replace(plan, split_k=max(1, min(programs // tiles, -(-k // 128) // 4, most)))


INT8_RULES = (
    Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2),
    Rule(32, Plan(block_m=32), per_sm=2),
    Rule(64, Plan(block_m=64), per_sm=2),
)
INT8 = Rule(LAST, Plan(block_m=128, warps=8, stages=3))


def choose_int8_plan(m: int, n: int, k: int, bits: int, group: int, *, sm_count: int) -> Plan:
    """Chooses the plan of 8-bit x `[m, k]` times a weight `[n, k]`, never dense: sums of integers stay exact.

    By the table of the present GPU, if it has one: one tile serves codes and 8-bit floats, and weights of all widths.

    Args:
        bits: of the weight.
        group: elements per scale. Groups that end inside a block take a product each: registers hold only few rows.
        sm_count: number of processors.
    """
    tile = tuned("qmatmul_int8", None, m, n=n, k=k, group=0 if group >= k else group)
    rule = default_int8_rule(m, group) if tile is None else int8_rule_of(tile)
    plan = rule.plan if tile is None else _widened(rule.plan, timed_bits(whole=group >= k), bits)
    return _split(plan, rule.per_sm * sm_count, m, n, k, 8)


def timed_bits(whole: bool) -> int:
    """Returns the width of weights that tiles of 8-bit x are timed with. whole: one group is a whole row."""
    return 8 if whole else 4


def _widened(plan: Plan, timed: int, bits: int) -> Plan:
    """Takes stages from a tile for weights that are wider than those it was timed with: what holds no more bytes of x
    and the weight still fits the shared memory of the GPU. Two stages always fit."""
    if bits <= timed:
        return plan
    held = (plan.stages - 1) * (8 * plan.block_m + timed * plan.block_n)
    return replace(plan, stages=min(plan.stages, max(2, 1 + held // (8 * plan.block_m + bits * plan.block_n))))


def default_int8_rule(m: int, group: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    return next((rule for rule in INT8_RULES if m <= rule.rows or group % 128 != 0), INT8)


def int8_rule_of(tile: dict[str, Any]) -> Rule:
    return rule_of({"dense": False, "scale_parts": False, **tile})


def rows_tile(m: int, k: int) -> tuple[int, int, int]:
    """Returns rows, columns and warps of a tile that quantizes x `[m, k]` by row."""
    block_k = 128
    while block_k < k and block_k < 16384:
        block_k *= 2
    block_m = 1
    while block_m < m and block_m * block_k < 2048:
        block_m *= 2
    return block_m, block_k, 4 if block_m * block_k <= 4096 else 8
