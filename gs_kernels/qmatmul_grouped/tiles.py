"""Chooses the tiles of products with the weights of experts: pure Python."""

from __future__ import annotations

from dataclasses import replace

from gs_kernels.qmatmul.tiles import FEW_ROWS, Plan, default_rule

MOST = 128  # rows of a tile: above, a tile of floats and its sums fill the registers


def choose_grouped_plan(m: int, experts: int, n: int, *, x_bits: int, levels: bool, sm: int, sm_count: int) -> Plan:
    """Chooses the plan of M rows that go to E experts of N outputs: by the rows of one, if all get as many.

    Never dense, and K is never split: where few rows leave processors idle, halves of tiles are shared among more of
    them, at the same instructions a weight. What is then still idle, in products of 1 to 4 us, is less than the second
    launch that parts of K take.

    Args:
        x_bits: of an element of x, 16 or 32.
        levels: whether values of codes are looked up.
        sm: 90 for compute capability 9.0.
        sm_count: number of processors.
    """
    each = -(-m // experts)
    slow = levels or x_bits == 32  # kernels do few rows at a time then
    plan = default_rule(min(max(each, 1), FEW_ROWS if slow else MOST), sm).plan
    plan = replace(plan, split_k=1, block_n=plan.block_n // 2 if x_bits == 32 else plan.block_n)
    half = replace(plan, block_n=plan.block_n // 2, warps=plan.warps // 2)
    few = not slow and plan.block_m == FEW_ROWS
    return half if few and _busiest(half, m, experts, n, sm_count) < _busiest(plan, m, experts, n, sm_count) else plan


def _busiest(plan: Plan, m: int, experts: int, n: int, sm_count: int) -> int:
    """Counts the outputs of the processor that gets most, if as many experts as can be have rows.

    That number is a power of two, and m only compared, so that a symbol is bounded, not fixed.
    """
    hit = next((1 << power for power in range(20) if m <= 1 << power or experts <= 1 << power), experts)
    programs = min(hit, experts) * -(-n // plan.block_n)
    return -(-programs // sm_count) * plan.block_n
