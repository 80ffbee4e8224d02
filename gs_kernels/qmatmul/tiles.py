"""Chooses how a product with a packed weight is computed, and in which tiles: pure Python, from a few rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gs_kernels.tuning.tables import LAST, tuned


@dataclass(frozen=True)
class Plan:
    """Says how a product is tiled. dense: dequantize once and multiply as a float layer does; the rest is then unused.

    scale_parts: scales on the product of a block, where groups allow, not on the weights.
    split_k: at most so many programs share one tile of y.
    """

    dense: bool = False
    scale_parts: bool = False
    block_m: int = 16
    block_n: int = 128
    split_k: int = 1
    warps: int = 4
    stages: int = 4

    def partials(self, blocks: int) -> int:
        """Counts the partial sums that `blocks` blocks along K are split into, none of them empty."""
        turns = -(-blocks // self.split_k)
        return -(-blocks // turns)


@dataclass(frozen=True)
class Rule:
    """Holds the plan of products with at most `rows` rows. programs: how many an SM should have to do, for split-K."""

    rows: int
    plan: Plan
    programs: int = 1


DENSE = Plan(dense=True)
FEW_ROWS = 16  # in fp32, or with a table of levels, kernels do only products with so few rows, bound by memory
FEW = Plan(scale_parts=True, block_m=FEW_ROWS)

# chosen by machine code: no spills, wgmma fed from registers and in flight, most programs per SM. Not timed yet
MORE_ROWS = (
    Rule(32, Plan(block_m=32), programs=2),
    Rule(64, Plan(block_m=64), programs=2),
    Rule(512, Plan(block_m=128, warps=8, stages=3)),
)
RULES: dict[int, tuple[Rule, ...]] = {
    100: (Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), programs=2), *MORE_ROWS),
    90: (Rule(FEW_ROWS, FEW, programs=2), *MORE_ROWS),
    80: (
        Rule(FEW_ROWS, FEW, programs=2),
        Rule(32, Plan(block_m=32), programs=2),
        Rule(256, Plan(block_m=64, warps=8, stages=3)),
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
    # partials are no more bytes to move than the weight
    return _split(plan, rule.programs * sm_count, m, n, k, k * bits // (32 * plan.block_m))


def default_rule(m: int, sm: int) -> Rule:
    """Returns the rule of a GPU without a table."""
    rules = RULES[max((least for least in RULES if least <= sm), default=min(RULES))]
    return next((rule for rule in rules if m <= rule.rows), Rule(LAST, DENSE))


def rule_of(tile: dict[str, Any]) -> Rule:
    """Turns a tile of a table into a rule for any number of rows."""
    return Rule(LAST, Plan(**{name: v for name, v in tile.items() if name != "programs"}), tile["programs"])


def _split(plan: Plan, programs: int, m: int, n: int, k: int, most: int) -> Plan:
    """Splits K into so many programs, if each has four turns to fill its pipeline."""
    tiles = -(-n // plan.block_n) * (1 if m <= plan.block_m else -(-m // plan.block_m))
    return replace(plan, split_k=max(1, min(programs // tiles, -(-k // 128) // 4, most)))


INT8_RULES = (
    Rule(FEW_ROWS, Plan(block_m=FEW_ROWS), programs=2),
    Rule(32, Plan(block_m=32), programs=2),
    Rule(64, Plan(block_m=64), programs=2),
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
    return _split(plan, rule.programs * sm_count, m, n, k, 8)


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
