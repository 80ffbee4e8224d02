"""What `golden-stick tune` does: finds the fastest tiles of packed products, or says without a GPU what to expect."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Lines

from gs_kernels.device import capabilities
from gs_kernels.dispatch import tuning_dir
from gs_kernels.tuning.cards import CARDS, find_card
from gs_kernels.tuning.qmatmul import DENSE, Product, Static
from gs_kernels.tuning.tables import file_name
from gs_kernels.tuning.tuner import OP, rank, tune

LAYERS = ["4096x4096", "14336x4096", "4096x14336"]  # of an 8B Llama
FOLDER = Path("golden-stick-tuning")


def parse_layer(text: str) -> tuple[int, int]:
    """`4096x14336` as (N, K): outputs by inputs."""
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdigit() for size in sizes):
        raise ValueError(f"tune: --layer must be OUTPUTSxINPUTS, e.g. 4096x14336, got {text!r}")
    return int(sizes[0]), int(sizes[1])


def run_tune(
    layers: list[str], bits: list[int], rows: list[int], device: str, keep: int, out: Path | None, console: Console
) -> None:
    problems = [
        Product(m, n, k, b) for b, (n, k), m in itertools.product(bits, map(parse_layer, layers), sorted(set(rows)))
    ]
    device = device or "cuda"
    if device in CARDS:
        _predict(problems, device, keep, console)
        return
    kind = device.partition(":")[0]
    if kind != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"tune: needs an NVIDIA GPU to time kernels, got {device} where torch sees "
            f"{torch.cuda.device_count()}; --device {', '.join(CARDS)} ranks tiles by a model and writes nothing"
        )
    path = (out or tuning_dir() or FOLDER) / file_name(capabilities(torch.device(device).index or 0).name)
    with _bar() as progress:
        table = tune(problems, path, device=device, keep=keep, progress=progress)
    lines = Lines("rows", "outputs", "inputs", "bits", "us", "tile")
    for entry in table.ops[OP]:
        lines.add_row(*map(str, entry.problem.values()), f"{entry.us:.1f}", _tile(entry.tile))
    console.print(lines)
    console.print(f"{path} is read where GS_TUNING_DIR={path.parent} is set")


def _predict(problems: list[Product], device: str, keep: int, console: Console) -> None:
    card = find_card(device)
    static = Static(card)
    console.print(f"No GPU is timed: what the cost model predicts for {card.name}, compiled for {card.target}.")
    for problem in problems:
        with _bar() as progress:
            ranking = rank(problem, static, progress)
        lines = Lines("predicted us", "tile", title=" ".join(f"{k}={v}" for k, v in vars(problem).items()))
        for ranked in ranking.tiles[:keep]:
            lines.add_row(f"{ranked.us:.1f}", _tile(ranked.tile))
        console.print(lines)
        dense = next(ranked.us for ranked in ranking.tiles if ranked.tile == DENSE)
        pruned = ", ".join(f"{n} {why}" for why, n in ranking.pruned.items()) or "none"
        console.print(f"dequantise, then multiply: {dense:.1f} us. Left out: {pruned}.")


def _tile(tile: dict[str, Any]) -> str:
    if tile["dense"]:
        return "dequantise, then multiply"
    parts = "scales on products" if tile["scale_parts"] else "scales on weights"
    size = f"{tile['block_m']} rows x {tile['block_n']} outputs, {tile['warps']} warps, {tile['stages']} stages"
    return f"{size}, {parts}, at least {tile['programs']} programs per SM"


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)
