"""Reports what can be known of every kernel without a GPU: `python -m bench.static`; `--check` guards against worse.

Nothing here is timed. Tables go to `bench/results/static/`, as JSON lines and as one page to read:

- `kernels.jsonl`: registers, shared memory, instructions, bytes and occupancy of every launch of the ahead-of-time gate
  on sm_80, sm_90 and sm_100, and what it takes at least on the card of that kind, by `gs_kernels.tuning.cost_model`.
- `steps.jsonl`: launches, calls of torch's own ops and bytes kept for backward of one training step.
- `ops.jsonl`: what every op takes at least on an H100 at the shapes that benchmarks time.
- `layers.jsonl`: how products with packed weights use the SMs of three cards, and what they take at least.

`--check` measures the first two again and fails if one is worse than what is kept. To accept a change: run without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.guard import worse
from bench.layers import layer_rows, layers_table
from bench.predict import predict_op
from bench.shapes import bench_shapes
from bench.steps import step_rows
from bench.tables.cells import shape_text, table
from gs_kernels.aot import Launch, launches_of, report
from gs_kernels.aot.ir_cost import work_of
from gs_kernels.aot.trace import traced
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import AotCase, OpSpec, Shape, distinct_launches, specs
from gs_kernels.tuning.cost_model import Prediction, bandwidth_share, estimate, predict_call
from gs_kernels.tuning.gpu_specs import CARDS, TYPICAL, Card

FOLDER = record.RESULTS / "static"
MANY, SOME = 30, 6  # shapes of a group
HEAD = """# Static figures: nothing here was timed

Written by `python -m bench.static`, with torch {torch} and triton {triton}. "at least" is what the cost model
(`gs_kernels/tuning/cost_model.py`) gives on the card of that kind, by its data sheet: the launch, then the slowest of
bytes, matrix products and instructions. A run on a GPU takes longer; by how much,
`python -m bench.predict` says of its rows. "of bandwidth" is the share of the card's memory bandwidth that a kernel
whose programs load, compute and store once is predicted to reach, with as many programs as an SM holds and with what
schedulers reach in practice.
"""
OF_LAYERS = """Programs take equal shares of the blocks of all tiles, or one a tile; busy SMs: the work of the average
SM as a share of that of the busiest. The other way: a tile each instead of shares, or shares instead of a tile each.
bf16: what a library reaches at the card's peaks; its tiles' bytes through L2 are not counted, those of ours are."""


def versions() -> dict[str, Any]:
    """Returns versions without the build: that for a GPU compiles no other kernels."""
    return {key: str(record.environment("cpu")[key]).partition("+")[0] for key in ("torch", "triton")}


def _times(prediction: Prediction) -> dict[str, Any]:
    parts = ("us", "bytes_us", "products_us", "instructions_us", "waves")
    return {name: round(getattr(prediction, name), 2) for name in parts} | {"bound": prediction.bound}


def kernel_rows(cards: Iterable[Card] = TYPICAL, op: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields one row per kernel of each launch of the gate and card, also where the gate has no bounds for it.

    A launch that a target does not compile gets a row with the reason.
    """
    from triton.compiler.errors import CompilationError

    for spec in specs():
        for case in distinct_launches(spec.aot) if op in (None, spec.name) else ():
            for card in cards:
                place = {"case": f"{spec.name}/{case.name}", "target": card.target}
                try:
                    launches = launches_of(case, card.target)
                except CompilationError as error:
                    if card.target in case.targets:
                        raise
                    yield {**place, "why": str(error).splitlines()[-1]}
                    continue
                yield from (place | _kernel_row(launch, case, card) for launch in launches)


def _kernel_row(launch: Launch, case: AotCase, card: Card) -> dict[str, Any]:
    kernel, work = report(launch.compiled, card.target, case.elements), work_of(launch)
    share = bandwidth_share(kernel, work, card)
    return {
        "kernel": kernel.kernel,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared_bytes": kernel.shared_bytes,
        "warps_per_sm": kernel.occupancy.warps,
        "limiter": kernel.occupancy.limiter,
        "instructions": kernel.instructions,
        "loop_instructions": kernel.loop_instructions,
        "per_element": round(kernel.per_element, 3),
        "nbytes": work.nbytes,
        **_times(estimate(kernel, work, card)),
        "bandwidth_share": None if share is None else round(share, 3),
    }


def op_shapes(spec: OpSpec) -> Iterator[tuple[str, Shape]]:
    """Yields the shapes that are for a GPU; of a group with more than `MANY`, some from its first to its last."""
    for group, shapes in bench_shapes(spec).items():
        step = 1 if len(shapes) <= MANY else len(shapes) // SOME
        yield from ((group, shape) for shape in shapes[::step] if group != "cpu")


def op_rows(card: Card = CARDS["h100"], op: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields one row per shape; beside products with packed weights, what a float one takes at least."""
    for spec in specs():
        for group, shape in op_shapes(spec) if op in (None, spec.name) else ():
            dtype = torch.bfloat16 if torch.bfloat16 in spec.tol else torch.float32
            parts = predict_op(spec, shape, dtype, "fwd", card)
            row = {
                "op": spec.name,
                "group": group,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "card": card.name,
                "kernels": len(parts),
                "us": round(sum(part.us for part in parts), 2),
                "bound": max(parts, key=lambda part: part.us).bound,
            }
            if "n" in shape and spec.name.startswith("qmatmul"):
                row["float_us"] = round(_float_us(shape, card), 2)
            yield row


def _float_us(shape: Shape, card: Card) -> float:
    x = torch.empty(shape["x"], dtype=torch.bfloat16, device="meta")
    w = torch.empty(shape["n"], shape["x"][-1], dtype=torch.bfloat16, device="meta")
    (call,) = traced(lambda: torch.nn.functional.linear(x, w), card.target).calls
    return predict_call(call, card).us


def page(
    kernels: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    ops: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    made_with: dict[str, Any],
) -> str:
    of_kernels = table(
        (
            "case",
            "target",
            "registers",
            "spills",
            "shared",
            "warps per SM",
            "instructions per element",
            "MB",
            "at least us",
            "bound",
            "of bandwidth",
        ),
        (
            (r["case"], r["target"], *["-"] * 7, r["why"], "-")
            if "why" in r
            else (
                *(r[name] for name in ("case", "target", "registers", "spills", "shared_bytes")),
                f"{r['warps_per_sm']} ({r['limiter']})",
                *(r["per_element"], f"{r['nbytes'] / 1e6:.1f}", r["us"], r["bound"]),
                "-" if r.get("bandwidth_share") is None else f"{r['bandwidth_share']:.0%}",
            )
            for r in kernels
        ),
    )
    of_steps = table(
        ("network", "training", "Triton launches", "calls of torch ops", "MB kept for backward"),
        ((r["network"], r["algorithm"], r["launches"], r["calls"], f"{r['saved_bytes'] / 1e6:.1f}") for r in steps),
    )
    of_ops = table(
        ("op", "shape", "dtype", "at least us", "bound", "bf16 at least us"),
        ((r["op"], shape_text(r["shape"]), r["dtype"], r["us"], r["bound"], r.get("float_us", "")) for r in ops),
    )
    parts = {
        "Kernels of the ahead-of-time gate, on A100, H100 and B200": of_kernels,
        "A training step, on an H100": of_steps,
        "Ops at the shapes of the benchmarks, on an H100": of_ops,
        "Layers of packed products, in groups of 128, bf16": f"{OF_LAYERS}\n\n{layers_table(layers)}",
    }
    sections = [f"## {title}\n\n{text}\n" for title, text in parts.items()]
    return "\n".join([HEAD.format(**made_with), *sections])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**versions(), **row}) + "\n" for row in rows))


def check(folder: Path, cards: Iterable[Card] = TYPICAL) -> list[str]:
    """Lists what is worse than the rows that are kept, one sentence each; of kernels, those for these cards."""
    cards = list(cards)
    kept = [row for row in record.read_rows(folder / "kernels.jsonl") if row["target"] in {c.target for c in cards}]
    return [
        *worse(kept, [{**row, **versions()} for row in kernel_rows(cards)]),
        *worse(record.read_rows(folder / "steps.jsonl"), [{**row, **versions()} for row in step_rows()]),
    ]


def _anew(name: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of a table: kept ones, if there are any, where the arguments do not ask for new ones."""
    kept, op = record.read_rows(path) if (path := chosen.folder / f"{name}.jsonl").exists() else [], chosen.op
    if name == "kernels":
        return _replaced(kept, kernel_rows(op=op), lambda row: row["case"].partition("/")[0], op)
    if name == "steps":
        return kept if kept and op else list(step_rows())
    if kept and not chosen.ops:
        return kept
    if name == "ops":
        return _replaced(kept, op_rows(op=op), lambda row: row["op"], op)
    return kept if kept and op not in (None, "qmatmul") else list(layer_rows())


def _replaced(
    kept: list[dict[str, Any]], rows: Iterable[dict[str, Any]], op_of: Callable[[dict[str, Any]], str], op: str | None
) -> list[dict[str, Any]]:
    """Returns new rows, where all are new; else kept rows with those of one op replaced, in their place."""
    new = list(rows)
    if op is None or not kept:
        return new
    at = next((i for i, row in enumerate(kept) if op_of(row) == op), len(kept))
    others = [row for row in kept if op_of(row) != op]
    return [*others[:at], *new, *others[at:]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is kept, write nothing")
    parser.add_argument("--ops", action="store_true", help="also predict ops and layers anew: takes minutes")
    parser.add_argument("--op", choices=[spec.name for spec in specs()], help="only rows of this op, others are kept")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: bench/results/static")
    chosen = parser.parse_args(argv)
    if INTERPRET:
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    if chosen.check:
        figures = check(chosen.folder)
        print("\n".join([*figures, f"{len(figures)} figures are worse than those kept in {chosen.folder}"]))
        return int(bool(figures))
    made = {name: _anew(name, chosen) for name in ("kernels", "steps", "ops", "layers")}
    for name, rows in made.items():
        write(chosen.folder / f"{name}.jsonl", rows)
    (chosen.folder / "README.md").write_text(page(**made, made_with=versions()))
    print(f"{', '.join(f'{len(rows)} {name}' for name, rows in made.items())} -> {chosen.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
