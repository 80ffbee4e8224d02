"""Chooses how a product with a packed weight is computed, and in which tiles: pure Python, from a few rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gs_kernels.qmatmul.counted import COUNTED, COUNTED_8, COUNTED_DENSE, COUNTED_FP32, Size
from gs_kernels.qmatmul.shares import MOST_TILES, Code, Tile, parts_of, split, tiles_of_rows
from gs_kernels.tuning.gpu_specs import Card, card_here
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

    @property
    def crowded(self) -> bool:
        """Returns whether a thread holds 128 sums and as many weights: offsets into x then have to be narrow."""
        return self.block_m * self.block_n >= 128 * 128 and self.warps == 4

    def partials(self, blocks: int) -> int:
        """Counts the partial sums that `blocks` blocks along K are split into, none of them empty."""
        turns = -(-blocks // self.split_k)
        return -(-blocks // turns)

    def parts(self, tiles: int, blocks: int) -> int:
        """Counts the programs, at most, whose shares meet in one of `tiles` tiles of `blocks` blocks along K."""
        return parts_of(tiles, blocks, self.shares)


@dataclass(frozen=True)
class Rule:
    """Holds the plans of products with at most `rows` rows: that is taken which is predicted to be done soonest.

    per_sm: how many programs an SM should have to do, at most, where K is split because that is done sooner than a tile
    each. 0: never. others: plans with larger tiles, of more rows, which dequantize less, or of more columns, which load
    x less often; and `DENSE`. timed: whether the plan was timed with K split as it says.
    """

    rows: int
    plan: Plan
    per_sm: int = 1
    others: tuple[Plan, ...] = ()
    timed: bool = False


DENSE = Plan(dense=True)
LIBRARY_TILE = 128  # rows and columns
FEW_ROWS = 16  # in fp32, or with a table of levels, kernels do only products with so few rows, bound by memory
FEW = Plan(scale_parts=True, block_m=FEW_ROWS)

# chosen by machine code: no spills, wgmma fed from registers and in flight, most programs per SM. Not timed yet
SOME_ROWS = (Rule(32, Plan(block_m=32), per_sm=2), Rule(64, Plan(block_m=64), per_sm=2))
MANY = Plan(block_m=128, warps=8, stages=3)
LARGE = replace(MANY, block_m=256)
# x for two programs an SM is most of what passes L2
BROAD = tuple(replace(rule, others=(replace(MANY, block_m=rule.rows, block_n=256),)) for rule in SOME_ROWS)
# above, dequantizing once takes less than a tenth of the product, which a library then does
MORE_ROWS = Rule(2048, MANY, per_sm=2, others=(LARGE, *BROAD[-1].others, SOME_ROWS[-1].plan, DENSE))
# two programs an SM, of which each multiplies while the other dequantizes
PAIR = replace(MANY, warps=4)
RULES: dict[int, tuple[Rule, ...]] = {
    # 99 KiB of shared memory hold no tile of 256 rows
    120: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *SOME_ROWS, Rule(512, MANY)),
    100: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2), *BROAD, MORE_ROWS),
    90: (Rule(FEW_ROWS, FEW, per_sm=2), *BROAD, replace(MORE_ROWS, others=(PAIR, *MORE_ROWS.others))),
    80: (
        Rule(FEW_ROWS, FEW, per_sm=2),
        Rule(32, Plan(block_m=32), per_sm=2),
        Rule(2048, Plan(block_m=64, warps=8, stages=3), others=(DENSE,)),
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
    symmetric: bool = False,
    sm: int,
    sm_count: int,
) -> Plan:
    """Chooses the plan of x `[m, k]` times a weight `[n, k]`; compares m only, so that a symbol is bounded, not fixed.

    Args:
        bits: of the weight.
        x_bits: of an element of x, 16 or 32.
        levels: whether the grid of the weight is a table.
        symmetric: whether the zero point of all groups is known to be the middle of the grid.
        sm: 90 for compute capability 9.0; the rules of the nearest one below are taken, else of the lowest.
        sm_count: number of processors.
    """
    has_table = x_bits == 16 and not levels
    tile = tuned("qmatmul", (sm, sm_count), m, n=n, k=k, bits=bits) if has_table else None
    rule = default_rule(m, sm) if tile is None else rule_of(tile)
    if rule.plan.dense or ((levels or x_bits == 32) and not m <= FEW_ROWS):
        return DENSE
    return plan_of(rule, m, n, k, bits, x_bits=x_bits, symmetric=symmetric, sm=sm, sm_count=sm_count)


def plan_of(
    rule: Rule, m: int, n: int, k: int, bits: int, *, x_bits: int, symmetric: bool = False, sm: int, sm_count: int
) -> Plan:
    """Returns the plan of a rule for the sizes of a product, as `choose_plan` has them."""
    card = card_here(sm, sm_count)
    # in fp32 a tile of weights takes twice the registers
    plan = rule.plan if x_bits == 16 else replace(rule.plan, block_n=rule.plan.block_n // 2)
    rows = _most_rows(rule, m)
    found = [_share(plan, _float_tile(plan, bits, x_bits, sm), rule, m, rows, n, k, card)]
    for other in rule.others:
        if other.dense:
            # a library is taken to reach the card's peak, which it can where each SM has a tile of its
            if -(-rows // LIBRARY_TILE) * -(-n // LIBRARY_TILE) >= card.sm_count:
                found.append((DENSE, dense_us(rows, n, k, bits, card)))
        # beside so many sums of a thread, 8-bit weights in small groups do not fit the registers, nor other zero points
        elif (bits < 8 or (other.block_m < 256 and not other.crowded)) and (symmetric or not other.crowded):
            found.append(_share(other, _float_tile(other, bits, x_bits, sm), rule, m, rows, n, k, card))
    return min(found, key=lambda one: one[1])[0]


def _most_rows(rule: Rule, m: int) -> int:
    """Returns the most rows that get the same plan as m."""
    return rule.plan.block_m * tiles_of_rows(m, rule.plan.block_m)


def default_rule(m: int, sm: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    return next((rule for rule in _least(RULES, sm) if m <= rule.rows), Rule(LAST, DENSE))


def rule_of(tile: dict[str, Any]) -> Rule:
    """Turns a tile of a table into a rule for any number of rows."""
    plan = Plan(**{name: v for name, v in tile.items() if name != "programs"})
    return Rule(LAST, plan, tile["programs"], timed=True)


EARLY_SM = 90  # the first compute capability with programmatic dependent launches


def _least(table: dict[int, Any], sm: int) -> Any:
    """Returns what is for the nearest compute capability that is not newer, else for the oldest."""
    return table[max((least for least in table if least <= sm), default=min(table))]


def _float_tile(plan: Plan, bits: int, x_bits: int, sm: int) -> Tile:
    if x_bits == 32:
        return _tile(plan, bits, 4, "fp32", COUNTED_FP32, sm)
    return _tile(plan, bits, 2, "16bit", _nearest(_least(COUNTED, sm), plan)[bits], sm)


def _nearest(known: dict[Size, Any], plan: Plan) -> Any:
    """Returns the code of a tile, of a tuned one that was not counted that of the nearest."""
    sizes = plan.block_m, plan.block_n, plan.warps
    return known[min(known, key=lambda one: sum(abs(math.log(a / b)) for a, b in zip(sizes, one, strict=True)))]


def _tile(plan: Plan, bits: int, x_bytes: int, kind: str, code: tuple[Code, Code], sm: int, adding: int = 100) -> Tile:
    # scales of 16 bits in groups of 128
    weight_bytes = bits / 8 + 1 / 64
    # products that are not waited for still read x
    x_stages = plan.stages if sm // 10 == 9 or (sm // 10 in (10, 11) and x_bytes == 2) else plan.stages - 1
    return Tile(
        plan.block_m, plan.block_n, x_bytes, weight_bytes, kind, plan.warps, plan.stages, x_stages, adding, *code
    )


def _share(plan: Plan, tile: Tile, rule: Rule, m: int, most: int, n: int, k: int, card: Card) -> tuple[Plan, float]:
    """Has programs share the blocks of all tiles evenly, where that is predicted to take less than a tile each.

    most: rows, no fewer than m, that it is predicted for. Returns the plan, and the microseconds that it takes.
    """
    tiles_m, tiles_n = -(-most // plan.block_m), -(-n // plan.block_n)
    blocks, early = -(-k // 128), card.sm >= EARLY_SM
    rows = 1 if m <= 1 else plan.block_m
    per_sm = rule.per_sm if tiles_m <= MOST_TILES else 0
    got = split(tile, tiles_m, tiles_n, blocks, rows, per_sm, card, early, rule.timed)
    return replace(plan, shares=got.shares, per_sm=got.per_sm, early=got.shares > 0 and early), got.us


DENSE_BYTES = 256 << 20  # of real values at a time, of a weight that is dequantized first


def dense_us(m: int, n: int, k: int, bits: int, card: Card) -> float:
    """Predicts dequantizing a weight, and then a product that is done at the card's peak, in bf16."""
    real, packed = 2 * n * k, n * k * (bits / 8 + 1 / 64)
    slabs = -(-real // DENSE_BYTES)
    held = _least(COUNTED_DENSE, card.sm)[bits] * card.sm_count
    dequantize = (packed + real) / min(card.bandwidth * 1e3, held / card.latency_us)
    product = max(2 * m * n * k / card.peaks["16bit"] / 1e6, (real + 2 * m * (k + n)) / card.bandwidth / 1e3)
    return 2 * slabs * card.launch_us + dequantize + product


INT8_FEW = Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), per_sm=2)
# sums of one group are scaled once, and those of a tile twice as large fit the registers
WHOLE = {120: (), 100: (LARGE,), 90: (replace(MANY, block_n=256), LARGE), 80: ()}


def choose_int8_plan(
    m: int, n: int, k: int, bits: int, group: int, *, points: bool, fp8: bool, sm: int, sm_count: int
) -> Plan:
    """Chooses the plan of 8-bit x `[m, k]` times a weight `[n, k]`, never dense: sums of integers stay exact.

    By the table of the present GPU, if it has one: one tile serves codes and 8-bit floats, and weights of all widths.

    Args:
        bits: of the weight.
        group: elements per scale. Groups that end inside a block take a product each: registers hold only few rows.
        points: whether each group has a zero point of its own: beside those, larger tiles do not fit the registers.
        fp8: whether x is of 8-bit floats.
        sm, sm_count: as `choose_plan` has them.
    """
    tile = tuned("qmatmul_int8", (sm, sm_count), m, n=n, k=k, group=0 if group >= k else group)
    rule = default_int8_rule(m, k, group, points, sm) if tile is None else int8_rule_of(tile)
    plan = rule.plan if tile is None else _widened(rule.plan, timed_bits(whole=group >= k), bits)
    return int8_plan_of(replace(rule, plan=plan), m, n, k, bits, group, fp8=fp8, sm=sm, sm_count=sm_count)


def int8_plan_of(
    rule: Rule, m: int, n: int, k: int, bits: int, group: int, *, fp8: bool, sm: int, sm_count: int
) -> Plan:
    """Returns the plan of a rule for the sizes of a product, as `choose_int8_plan` has them."""
    counted, card, rows = _least(COUNTED_8, sm), card_here(sm, sm_count), _most_rows(rule, m)
    known = counted[("fp8" if fp8 and "fp8" in counted else "int8") + (" row" if group >= k else "")]
    adding = 145 if group >= k and not fp8 else 100  # where whole numbers are scaled when their parts are added
    plans = (rule.plan, *rule.others)
    tiles = [(plan, _tile(plan, bits, 1, "int8", _nearest(known, plan), sm, adding)) for plan in plans]
    return min((_share(plan, tile, rule, m, rows, n, k, card) for plan, tile in tiles), key=lambda one: one[1])[0]


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


def default_int8_rule(m: int, k: int, group: int, points: bool, sm: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    if group % 128 != 0 and group < k:
        return INT8_FEW
    if m <= BROAD[-1].rows:
        return next(rule for rule in (INT8_FEW, *(SOME_ROWS if points else BROAD)) if m <= rule.rows)
    if points:
        return Rule(LAST, MANY)
    larger = _least(WHOLE, sm) if group >= k else ()
    return Rule(LAST, MANY, per_sm=2, others=(*larger, *BROAD[-1].others, SOME_ROWS[-1].plan))


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
