"""Compares measured rows with what the cost model says they take at least: `python -m bench.predict FILE...`.

Of rows that `bench.run` wrote on a GPU that `gs_kernels.tuning.gpu_specs` describes. A ratio below 1 is an error of the
model, or a call that did not do its work; one far above 1 is time that bytes, products and instructions do not explain.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.record import read_rows
from bench.tables.cells import shape_text
from gs_kernels.aot.trace import traced
from gs_kernels.runtime.opspec import OpSpec, Shape, specs
from gs_kernels.tuning.cost_model import Prediction, predict_trace
from gs_kernels.tuning.gpu_specs import Card, assumed, card_of

COLUMNS = "{:22} {:28} {:>5} {:>9} {:>9} {:>9} {:>9}  {}"


@dataclass(frozen=True)
class Compared:
    """Holds a row, its time and its predicted time in microseconds, and what bounds the latter."""

    row: dict[str, Any]
    card: Card
    us: float
    least_us: float
    bound: str

    @property
    def ratio(self) -> float:
        return self.us / self.least_us


def predict_op(spec: OpSpec, shape: Shape, dtype: torch.dtype, direction: str, card: Card) -> list[Prediction]:
    """Predicts what the kernels of one call of an op, "fwd" or "f+b", take at least on a card."""
    case = spec.make(shape, dtype, torch.device("meta"), torch.Generator())

    def call() -> None:
        for i in case.grad_args if direction == "f+b" else ():
            case.args[i].requires_grad_()
        y = spec.run(*case.args, **case.kwargs)
        if direction == "f+b":
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.empty_like(y))

    with assumed(card):
        return predict_trace(traced(call, card.target), card)


def compare(rows: Iterable[dict[str, Any]]) -> list[Compared]:
    """Predicts the rows that have a time of ours and a GPU that is described."""
    by_name = {spec.name: spec for spec in specs()}
    compared = []
    for row in rows:
        card = card_of(str(row.get("device_name", "")))
        if card is None or row.get("kind") != "op" or row.get("provider") != "ours" or "ms_p20" not in row:
            continue
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in row["shape"].items()}
        parts = predict_op(by_name[row["op"]], shape, getattr(torch, row["dtype"]), row["direction"], card)
        slowest = max(parts, key=lambda part: part.us)
        compared.append(Compared(row, card, 1e3 * row["ms_p20"], sum(part.us for part in parts), slowest.bound))
    return compared


def summary(compared: Iterable[Compared]) -> list[str]:
    """Returns one line per op and card: how many rows, the ratios, and the shape with the worst."""
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for one in compared:
        groups[one.row["op"], one.card.name].append(one)
    lines = [COLUMNS.format("op", "card", "rows", "least", "median", "p80", "most", "the shape with the most")]
    for (op, card), members in sorted(groups.items()):
        ratios = sorted(one.ratio for one in members)
        p50, p80 = (quantiles(ratios, n=10)[i] for i in (4, 7)) if len(ratios) > 1 else (ratios[0], ratios[0])
        worst = max(members, key=lambda one: one.ratio)
        numbers = (f"{ratio:.2f}x" for ratio in (ratios[0], p50, p80, ratios[-1]))
        shape = shape_text(worst.row["shape"])
        lines.append(COLUMNS.format(op, card, len(members), *numbers, f"{shape} ({worst.bound})"))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="rows of bench.run")
    chosen = parser.parse_args(argv)
    compared = compare(row for path in chosen.files for row in read_rows(path))
    if not compared:
        print("bench.predict: needs rows of bench.run from a GPU that is described, got none", file=sys.stderr)
        return 2
    print("\n".join(summary(compared)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
