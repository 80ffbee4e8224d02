"""Predicts products of the layers of `gs_kernels.qmatmul.spec` on described cards: nothing is timed.

`bench.static` keeps the rows. A row is a layer, a width of weights and a number of rows, and holds for each card how
its SMs are used and what the cost model says that the product takes at least: packed as the rules do it, packed the
other way (shares instead of a tile each, or a tile each), and in bf16.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from bench.tables.cells import table
from gs_kernels.aot.trace import Call, trace_launcher
from gs_kernels.qmatmul.spec import LAYERS
from gs_kernels.qmatmul.tiles import Plan, choose_int8_plan, choose_plan
from gs_kernels.qmatmul.tune import make_weight
from gs_kernels.tuning.cost_model import Prediction, predict_call, predict_trace
from gs_kernels.tuning.gpu_specs import CARDS, Card, assumed

NAMES = ("h100", "h200", "b200")
ROWS = (1, 16, 64, 256, 1024, 4096)
FEW = ROWS[:3]


def busy(plan: Plan, m: int, n: int, k: int, sm_count: int) -> float:
    """Returns the work of the average SM as a share of that of the busiest one, counted in blocks of K."""
    tiles, blocks = -(-m // plan.block_m) * -(-n // plan.block_n), -(-k // 128)
    most = -(-tiles // sm_count) * blocks
    if plan.shares:
        starts = [rank * tiles * blocks // plan.shares for rank in range(0, plan.shares + 1, plan.per_sm)]
        most = max(end - start for start, end in pairwise(starts))
    return tiles * blocks / sm_count / most


def layer_rows(names: Iterable[str] = NAMES) -> Iterator[dict[str, Any]]:
    """Yields one row per layer, width and number of rows of x: bf16, few of them with 2 and 1 bits, and few of int8."""
    cards = {name: CARDS[name] for name in names}
    groups = (("bf16", 4, ROWS), ("bf16", 2, FEW), ("bf16", 1, FEW), ("int8", 4, FEW))
    for x, bits, all_rows in groups:
        for (n, k), m in itertools.product(LAYERS, all_rows):
            on = {name: _on_card(x, m, n, k, bits, card) for name, card in cards.items()}
            yield {"x": x, "bits": bits, "n": n, "k": k, "m": m, **on}


def _on_card(x: str, m: int, n: int, k: int, bits: int, card: Card) -> dict[str, Any]:
    sm, sms = int(card.target.removeprefix("sm_")), card.sm_count
    with assumed(card):
        if x == "bf16":
            plan = choose_plan(m, n, k, bits, x_bits=16, levels=False, sm=sm, sm_count=sms)
        else:
            plan = choose_int8_plan(m, n, k, bits, 128, sm=sm, sm_count=sms)
    # the other way of the same tiles: one each, or as many shares as the rules take
    each = 2 if plan.warps == 4 else 1
    other = replace(plan, shares=0) if plan.shares else replace(plan, shares=each * sms, per_sm=each, early=sm >= 90)
    parts = _parts(x, m, n, k, bits, plan, card)
    floats = Call("aten::linear", 2 * (m * k + n * k + m * n), 2 * m * n * k, "16bit")
    return {
        "tile": "dense" if plan.dense else f"{plan.block_m} x {plan.block_n}",
        "programs": plan.shares,
        "busy": None if plan.dense else round(busy(plan, m, n, k, sms), 3),
        "launches": len(parts),
        "us": round(sum(part.us for part in parts), 2),
        "other_us": None if plan.dense else round(sum(p.us for p in _parts(x, m, n, k, bits, other, card)), 2),
        "float_us": round(predict_call(floats, card).us, 2),
    }


def _parts(x: str, m: int, n: int, k: int, bits: int, plan: Plan, card: Card) -> list[Prediction]:
    """Predicts a product with this plan, in groups of 128."""
    kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
    rows = torch.empty(m, k, dtype=torch.bfloat16 if x == "bf16" else torch.int8, device="meta")
    weight = make_weight(bits, n, k, 128, torch.bfloat16 if x == "bf16" else torch.float32, "meta")

    def run() -> None:
        if plan.dense:
            kernel.multiply_dense(rows, weight, None, "none")
        elif x == "bf16":
            kernel.multiply(rows, weight, None, "none", plan, True)
        else:
            x_scale = torch.empty(m, device="meta")
            kernel.multiply_int8(rows, x_scale, None, None, weight, None, "none", torch.bfloat16, plan, True)

    return predict_trace(trace_launcher(run, card.target), card)


def layers_table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the rows as a table, a line for each card."""
    columns = ("x", "bits", "N x K", "M", "card", "tile", "programs", "busy SMs", "launches", "at least us")
    lines = []
    for row in rows:
        for name in NAMES:
            on = row[name]
            share = "-" if on["busy"] is None else f"{100 * on['busy']:.1f} %"
            place = (row["x"], row["bits"], f"{row['n']} x {row['k']}", row["m"], CARDS[name].name.split()[1])
            programs = "-" if on["busy"] is None else on["programs"] or "one a tile"
            times = f"{on['us']} ({on['float_us'] / on['us']:.2f}x)", on["other_us"] or "-", on["float_us"]
            lines.append((*place, on["tile"], programs, share, on["launches"], *times))
    return table((*columns, "the other way", "bf16 at least us"), lines)
