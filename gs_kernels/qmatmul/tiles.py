"""Chooses how a product with a packed weight is computed, and in which tiles: pure Python, from a few rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gs_kernels.qmatmul.shares import Tile, split, tiles_of_rows
from gs_kernels.tuning.gpu_specs import card_here
from gs_kernels.tuning.tables import LAST, tuned


@dataclass(frozen=True)
class Plan:
    """Says how a product is tiled. dense: dequantize once and multiply as a float layer does; the rest is then unused.

    scale_parts: scales on the product of a block, where groups allow, not on the weights.
    split_k: at most so many programs share one tile of y, of convolutions.
    shares: so many programs take equal shares of the blocks along K of all tiles, and there are as many blocks or more;
        0: each does a tile.
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

    K is split where that is done sooner than a tile each. 0: never. larger: a plan with larger tiles, taken where that
    is done sooner: of more rows, which dequantizes less, or of more columns, which loads x less often. timed: whether
    the plan was timed with K split as it says.
    """

    rows: int
    plan: Plan
    per_sm: int = 1
    larger: Plan | None = None
    timed: bool = False


DENSE = Plan(dense=True)
FEW_ROWS = 16  # in fp32, or with a table of levels, kernels do only products with so few rows, bound by memory
FEW = Plan(scale_parts=True, block_m=FEW_ROWS)

# chosen by machine code: no spills, wgmma fed from registers and in flight, most programs per SM. Not timed yet
SOME_ROWS = (Rule(32, Plan(block_m=32), per_sm=2), Rule(64, Plan(block_m=64), per_sm=2))
MANY = Plan(block_m=128, warps=8, stages=3)
# above, dequantizing once takes less than a tenth of the product, which a library then does
MORE_ROWS = Rule(2048, MANY, larger=replace(MANY, block_m=256))
# on Hopper x for two programs an SM is most of what passes L2
BROAD = tuple(replace(rule, larger=replace(MANY, block_m=rule.rows, block_n=256)) for rule in SOME_ROWS)
RULES: dict[int, tuple[Rule, ...]] = {
    # 99 KiB of shared memory hold no tile of 256 rows
    120: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *SOME_ROWS, Rule(512, MANY)),
    100: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *SOME_ROWS, MORE_ROWS),
    90: (Rule(FEW_ROWS, FEW, per_sm=2), *BROAD, MORE_ROWS),
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
    return plan_of(rule, m, n, k, bits, x_bits=x_bits, sm=sm, sm_count=sm_count)


def plan_of(rule: Rule, m: int, n: int, k: int, bits: int, *, x_bits: int, sm: int, sm_count: int) -> Plan:
    """Returns the plan of a rule for the sizes of a product, as `choose_plan` has them."""
    # in fp32 a tile of weights takes twice the registers
    plan = rule.plan if x_bits == 16 else replace(rule.plan, block_n=rule.plan.block_n // 2)
    plan, us = _share(plan, _float_tile(plan, bits, x_bits, sm), rule, m, n, k, sm, sm_count)
    # beside 256 rows of sums, 8-bit weights in small groups do not fit the registers
    if rule.larger is not None and (bits < 8 or rule.larger.block_m < 256):
        tile = _float_tile(rule.larger, bits, x_bits, sm)
        larger, larger_us = _share(rule.larger, tile, rule, m, n, k, sm, sm_count)
        if larger_us < us:
            return larger
    return plan


def default_rule(m: int, sm: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    return next((rule for rule in _least(RULES, sm) if m <= rule.rows), Rule(LAST, DENSE))


def rule_of(tile: dict[str, Any]) -> Rule:
    """Turns a tile of a table into a rule for any number of rows."""
    plan = Plan(**{name: v for name, v in tile.items() if name != "programs"})
    return Rule(LAST, plan, tile["programs"], timed=True)


EARLY_SM = 90  # the first compute capability with programmatic dependent launches
# by compute capability, as RULES: instructions a weight, and a row of a tile, of products with 16-bit x
ISSUED = {120: (1.2, 0.055), 100: (2.5, 0.0065), 90: (2.1, 0.0065), 80: (1.2, 0.055)}
ISSUED_FP32 = 25.0
REGISTERS = 150  # of a thread, beside its sums


def _least(table: dict[int, Any], sm: int) -> Any:
    """Returns what is for the nearest compute capability that is not newer, else for the oldest."""
    return table[max((least for least in table if least <= sm), default=min(table))]


def _float_tile(plan: Plan, bits: int, x_bits: int, sm: int) -> Tile:
    least, a_row = _least(ISSUED, sm)
    kind, issued = ("16bit", least + a_row * plan.block_m) if x_bits == 16 else ("fp32", ISSUED_FP32)
    return _tile(plan, bits, x_bits // 8, kind, issued, REGISTERS)


def _tile(plan: Plan, bits: int, x_bytes: int, kind: str, issued: float, registers: int) -> Tile:
    # scales of 16 bits in groups of 128
    weight_bytes = bits / 8 + 1 / 64
    return Tile(plan.block_m, plan.block_n, x_bytes, weight_bytes, kind, issued, registers, plan.warps, plan.stages)


def _share(plan: Plan, tile: Tile, rule: Rule, m: int, n: int, k: int, sm: int, sm_count: int) -> tuple[Plan, float]:
    """Has programs share the blocks of all tiles evenly, where that is predicted to take less than a tile each.

    Returns the plan, and the microseconds that it is predicted to take.
    """
    tiles_m = tiles_of_rows(m, plan.block_m)
    if tiles_m == 0:
        return plan, math.inf
    tiles, blocks, early = tiles_m * -(-n // plan.block_n), -(-k // 128), sm >= EARLY_SM
    rows = 1 if m <= 1 else plan.block_m
    got = split(tile, tiles, blocks, rows, rule.per_sm, card_here(sm, sm_count), early, rule.timed)
    return replace(plan, shares=got.shares, per_sm=got.per_sm, early=got.shares > 0 and early), got.us


INT8_ISSUED = {90: (1.3, 0.016), 80: (1.0, 0.035)}  # as ISSUED, of 8-bit x
INT8_REGISTERS = 100
INT8_RULES = (
    Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2),
    Rule(32, Plan(block_m=32), per_sm=2),
    Rule(64, Plan(block_m=64), per_sm=2),
)
INT8 = Rule(LAST, Plan(block_m=128, warps=8, stages=3))


def choose_int8_plan(m: int, n: int, k: int, bits: int, group: int, *, sm: int, sm_count: int) -> Plan:
    """Chooses the plan of 8-bit x `[m, k]` times a weight `[n, k]`, never dense: sums of integers stay exact.

    By the table of the present GPU, if it has one: one tile serves codes and 8-bit floats, and weights of all widths.

    Args:
        bits: of the weight.
        group: elements per scale. Groups that end inside a block take a product each: registers hold only few rows.
        sm, sm_count: as `choose_plan` has them.
    """
    tile = tuned("qmatmul_int8", (sm, sm_count), m, n=n, k=k, group=0 if group >= k else group)
    rule = default_int8_rule(m, group) if tile is None else int8_rule_of(tile)
    plan = rule.plan if tile is None else _widened(rule.plan, timed_bits(whole=group >= k), bits)
    return int8_plan_of(replace(rule, plan=plan), m, n, k, bits, sm=sm, sm_count=sm_count)


def int8_plan_of(rule: Rule, m: int, n: int, k: int, bits: int, *, sm: int, sm_count: int) -> Plan:
    """Returns the plan of a rule for the sizes of a product, as `choose_int8_plan` has them."""
    least, a_row = _least(INT8_ISSUED, sm)
    tile = _tile(rule.plan, bits, 1, "int8", least + a_row * rule.plan.block_m, INT8_REGISTERS)
    return _share(rule.plan, tile, rule, m, n, k, sm, sm_count)[0]


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
