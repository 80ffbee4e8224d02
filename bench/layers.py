"""Predicts products of the layers of `gs_kernels.qmatmul.spec` on described cards: nothing is timed.

`bench.static` keeps the rows. A row is a layer, a width of weights and a number of rows, and holds for each card how
its SMs are used and what the cost model says that the product takes at least, packed and in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from bench.tables.cells import table
from gs_kernels.aot.trace import Call, trace_launcher
from gs_kernels.qmatmul.spec import LAYERS
from gs_kernels.qmatmul.tiles import Plan, choose_plan
from gs_kernels.tuning.cost_model import predict_call, predict_trace
from gs_kernels.tuning.gpu_specs import CARDS, Card
from gs_kernels.tuning.space import Machine, find_space

NAMES = ("h100", "h200", "b200")
ROWS = (1, 16, 64, 256, 1024, 4096)
SPACE = find_space("qmatmul")


def busy(plan: Plan, m: int, n: int, k: int, sm_count: int) -> float:
    """Returns the work of the average SM as a share of that of the busiest one, counted in blocks of K."""
    tiles, blocks = -(-m // plan.block_m) * -(-n // plan.block_n), -(-k // 128)
    most = -(-tiles // sm_count) * blocks
    if plan.shares:
        starts = [rank * tiles * blocks // plan.shares for rank in range(0, plan.shares + 1, plan.per_sm)]
        most = max(end - start for start, end in pairwise(starts))
    return tiles * blocks / sm_count / most


def layer_rows(names: Iterable[str] = NAMES) -> Iterator[dict[str, Any]]:
    """Yields one row per layer, number of rows of x and width, 2 and 1 bits with few rows only."""
    cards = {name: CARDS[name] for name in names}
    for bits in (4, 2, 1):
        for n, k in LAYERS:
            for m in ROWS if bits == 4 else ROWS[:3]:
                on = {name: _on_card(m, n, k, bits, card) for name, card in cards.items()}
                yield {"bits": bits, "n": n, "k": k, "m": m, **on}


def _on_card(m: int, n: int, k: int, bits: int, card: Card) -> dict[str, Any]:
    problem = {"m": m, "n": n, "k": k, "bits": bits}
    machine = Machine(int(card.target.removeprefix("sm_")), card.sm_count)
    plan = choose_plan(m, n, k, bits, x_bits=16, levels=False, sm=machine.sm, sm_count=machine.sm_count)
    operands = SPACE.make(problem, "meta")
    trace = trace_launcher(lambda: SPACE.run(problem, operands, machine), card.target)
    parts = predict_trace(trace, card)
    floats = Call("aten::linear", 2 * (m * k + n * k + m * n), 2 * m * n * k, "16bit")
    return {
        "tile": "dense" if plan.dense else f"{plan.block_m} x {plan.block_n}",
        "programs": plan.shares,
        "busy": None if plan.dense else round(busy(plan, m, n, k, card.sm_count), 3),
        "launches": len(parts),
        "us": round(sum(part.us for part in parts), 2),
        "float_us": round(predict_call(floats, card).us, 2),
    }


def layers_table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the rows as a table, a line for each card."""
    head = ("bits", "N x K", "M", "card", "tile", "programs", "busy SMs", "launches", "at least us", "bf16 at least us")
    lines = []
    for row in rows:
        for name in NAMES:
            on = row[name]
            share = "-" if on["busy"] is None else f"{100 * on['busy']:.1f} %"
            place = (row["bits"], f"{row['n']} x {row['k']}", row["m"], CARDS[name].name.split()[1])
            programs = "-" if on["busy"] is None else on["programs"] or "one a tile"
            times = f"{on['us']} ({on['float_us'] / on['us']:.2f}x)", on["float_us"]
            lines.append((*place, on["tile"], programs, share, on["launches"], *times))
    return table(head, lines)
