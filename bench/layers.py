"""Predicts products of the layers of `gs_kernels.qmatmul.spec` on described cards: nothing is timed.

`bench.static` keeps the rows. A row is a layer, a width of weights and a number of rows, and holds for each card how
its SMs are used and what the cost model says that the product takes at least: packed as the rules do it, packed the
other way (shares instead of a tile each, or a tile each), in the best of all tiles that rules know, and in bf16.
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
from gs_kernels.aot.report import report
from gs_kernels.aot.trace import Call, trace_launcher
from gs_kernels.qmatmul.shares import MOST_TILES, Code
from gs_kernels.qmatmul.spec import LAYERS
from gs_kernels.qmatmul.tiles import DENSE, Plan, choose_int8_plan, choose_plan, default_int8_rule, default_rule
from gs_kernels.qmatmul.tune import make_weight
from gs_kernels.tuning.cost_model import Prediction, predict_call, predict_trace
from gs_kernels.tuning.gpu_specs import CARDS, Card, assumed

NAMES = ("a100", "h100", "h200", "b200")
ROWS = (1, 16, 64, 256, 1024, 2048, 4096)
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
EIGHT = (("int8", 4), ("fp8", 4), ("int8", 8))
DENSE_ROWS = 256  # from which a weight may be dequantized first


def busy(plan: Plan, m: int, n: int, k: int, sm_count: int) -> float:
    """Returns the work of the average SM as a share of that of the busiest one, counted in blocks of K."""
    tiles, blocks = -(-m // plan.block_m) * -(-n // plan.block_n), -(-k // 128)
    most = -(-tiles // sm_count) * blocks
    if plan.shares:
        starts = [rank * tiles * blocks // plan.shares for rank in range(0, plan.shares + 1, plan.per_sm)]
        most = max(end - start for start, end in pairwise(starts))
    return tiles * blocks / sm_count / most


def layer_rows(names: Iterable[str] = NAMES) -> Iterator[dict[str, Any]]:
    """Yields one row per layer, width and number of rows of x, in bf16 and in 8 bits."""
    cards = {name: CARDS[name] for name in names}
    groups = (*(("bf16", bits, ROWS) for bits in (4, 2, 1, 8)), *((x, bits, ROWS) for x, bits in EIGHT))
    for x, bits, all_rows in groups:
        for (n, k), m in itertools.product(LAYERS, all_rows):
            on = {name: _on_card(x, m, n, k, bits, card) for name, card in cards.items()}
            yield {"x": x, "bits": bits, "n": n, "k": k, "m": m, **on}


def _on_card(x: str, m: int, n: int, k: int, bits: int, card: Card) -> dict[str, Any] | None:
    if x not in ("bf16", "int8") and x not in card.peaks:
        return None
    plan = chosen(x, m, n, k, bits, card)
    # the other way of the same tiles: one each, or as many shares as the rules take
    other = replace(plan, shares=0) if plan.shares else next(iter(shared(plan, card)), plan)
    parts = _parts(x, m, n, k, bits, plan, card)
    us = sum(part.us for part in parts)
    best, best_us = plan, us
    for one in candidates(x, m, bits, card):
        one_us = sum(part.us for part in _parts(x, m, n, k, bits, one, card))
        best, best_us = (one, one_us) if one_us < best_us else (best, best_us)
    floats = Call("aten::linear", 2 * (m * k + n * k + m * n), 2 * m * n * k, "16bit")
    return {
        "tile": tile_name(plan),
        "programs": plan.shares,
        "busy": None if plan.dense else round(busy(plan, m, n, k, card.sm_count), 3),
        "launches": len(parts),
        "us": round(us, 2),
        "other_us": None if plan.dense else round(sum(p.us for p in _parts(x, m, n, k, bits, other, card)), 2),
        "best": tile_name(best),
        "best_programs": best.shares,
        "best_us": round(best_us, 2),
        "float_us": round(predict_call(floats, card).us, 2),
    }


def group_of(x: str, bits: int, k: int) -> int:
    """Returns the elements per scale of a weight `[n, k]`: 8 bits beside 8-bit x have one a row, as between layers."""
    return k if (x, bits) == ("int8", 8) else 128


def tile_name(plan: Plan) -> str:
    pair = ", 2 an SM" if plan.crowded else ""
    return "dense" if plan.dense else f"{plan.block_m} x {plan.block_n}{pair}"


def chosen(x: str, m: int, n: int, k: int, bits: int, card: Card) -> Plan:
    """Returns the plan of the rules on a card."""
    on = {"sm": card.sm, "sm_count": card.sm_count}
    with assumed(card):
        if x == "bf16":
            return choose_plan(m, n, k, bits, x_bits=16, levels=False, symmetric=True, **on)
        return choose_int8_plan(m, n, k, bits, group_of(x, bits, k), points=False, fp8=x == "fp8", **on)


def shared(plan: Plan, card: Card) -> list[Plan]:
    """Returns the plan in equal shares: as many programs an SM as it holds, and one; none that would spill."""
    if plan.crowded:
        return []
    return [
        replace(plan, shares=each * card.sm_count, per_sm=each, early=card.sm >= 90)
        for each in ((2, 1) if plan.warps == 4 else (1,))
    ]


def counted(plan: Plan, bits: int, card: Card) -> Code:
    """Counts the machine code of a product of bf16 rows with this plan, as rules know it."""
    kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
    x = torch.empty(plan.block_m, 4096, dtype=torch.bfloat16, device="meta")
    weight = make_weight(bits, 14336, 4096, 128, torch.bfloat16, "meta")
    trace = trace_launcher(lambda: kernel.multiply(x, weight, None, "none", plan, True), card.target)
    got = report(trace.launches[0].compiled, card.target, 128 * plan.block_n)
    return Code(got.per_element, got.instructions - got.loop_instructions, got.occupancy.blocks)


def candidates(x: str, m: int, bits: int, card: Card) -> list[Plan]:
    """Returns what rules of the card know: tiles that m rows fill by half or more, or of 64 rows or more, each once,
    also in shares where these are of few tiles of rows; and, with many rows, dequantizing first."""
    if x == "bf16":
        rules = [default_rule(rows, card.sm) for rows in ROWS]
    else:
        rules = [default_int8_rule(rows, 4096, group_of(x, bits, 4096), False, card.sm) for rows in ROWS]
    plans = dict.fromkeys(plan for rule in rules for plan in (rule.plan, *rule.others) if not plan.dense)
    fits = [plan for plan in plans if min(m, 64) <= plan.block_m <= max(16, 2 * m - 1)]
    if (x, bits) == ("bf16", 8):
        fits = [plan for plan in fits if plan.block_m < 256 and not plan.crowded]
    found = [one for plan in fits for one in (plan, *(shared(plan, card) if m <= MOST_TILES * plan.block_m else ()))]
    return [*found, *([DENSE] if x == "bf16" and m >= DENSE_ROWS else [])]


def _parts(x: str, m: int, n: int, k: int, bits: int, plan: Plan, card: Card) -> list[Prediction]:
    """Predicts a product with this plan."""
    kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
    rows = torch.empty(m, k, dtype=DTYPES[x], device="meta")
    weight = make_weight(bits, n, k, group_of(x, bits, k), torch.float32 if x == "int8" else torch.bfloat16, "meta")
    sums = torch.empty(-(-k // 128), m, dtype=torch.float32, device="meta") if x == "fp8" else None

    def run() -> None:
        if plan.dense:
            kernel.multiply_dense(rows, weight, None, "none")
        elif x == "bf16":
            kernel.multiply(rows, weight, None, "none", plan, True)
        else:
            x_scale = torch.empty(m, device="meta")
            kernel.multiply_int8(rows, x_scale, sums, None, weight, None, "none", torch.bfloat16, plan, True)

    return predict_trace(trace_launcher(run, card.target), card)


def layers_table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the rows as a table, a line for each card."""
    columns = ("x", "bits", "N x K", "M", "card", "tile", "programs", "busy SMs", "launches", "at least us")
    others = ("the other way", "best of all tiles", "bf16 at least us")
    lines = []
    for row in rows:
        for name in NAMES:
            on = row[name]
            if on is None:
                continue
            share = "-" if on["busy"] is None else f"{100 * on['busy']:.1f} %"
            place = (row["x"], row["bits"], f"{row['n']} x {row['k']}", row["m"], CARDS[name].name.split()[1])
            programs = "-" if on["busy"] is None else on["programs"] or "one a tile"
            best = f"{on['best_us']} ({on['best']}, {on['best_programs'] or 'one a tile'})"
            best = "the same" if on["best_us"] == on["us"] else best
            times = f"{on['us']} ({on['float_us'] / on['us']:.2f}x)", on["other_us"] or "-", best, on["float_us"]
            lines.append((*place, on["tile"], programs, share, on["launches"], *times))
    return table((*columns, *others), lines)
