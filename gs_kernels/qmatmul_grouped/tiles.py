"""Chooses the tiles of products with the weights of experts: pure Python."""

from __future__ import annotations

from dataclasses import replace

from gs_kernels.qmatmul.tiles import FEW_ROWS, Plan, default_rule

MOST = 128  # rows of a tile: above, a tile of floats and its sums fill the registers


def choose_grouped_plan(m: int, experts: int, *, x_bits: int, levels: bool, sm: int) -> Plan:
    """Chooses the plan of M rows that go to E experts: by the rows of one, if all get as many; never dense, nor split.

    Args:
        x_bits: of an element of x, 16 or 32.
        levels: whether values of codes are looked up.
        sm: 90 for compute capability 9.0.
    """
    each = -(-m // experts)
    slow = levels or x_bits == 32  # kernels do few rows at a time then
    plan = default_rule(min(max(each, 1), FEW_ROWS if slow else MOST), sm).plan
    return replace(plan, split_k=1, block_n=plan.block_n // 2 if x_bits == 32 else plan.block_n)
