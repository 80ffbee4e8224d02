"""Runs `golden-stick tune`: finds the fastest tiles of our kernels, or says without a GPU what to expect."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Lines
from torch import Tensor, nn

from gs_kernels.runtime.device import capabilities
from gs_kernels.runtime.dispatch import tuning_dir
from gs_kernels.tuning.from_machine_code import Static
from gs_kernels.tuning.gpu_specs import CARDS, find_card
from gs_kernels.tuning.shortlists import read_lists, write_lists
from gs_kernels.tuning.space import Problem, find_space
from gs_kernels.tuning.tables import file_name
from gs_kernels.tuning.tuner import compilers, name_of, rank_lists, tune

LAYERS = ["4096x4096", "14336x4096", "4096x14336"]  # of an 8B Llama
LAYER_HELP = "OUTPUTSxINPUTS, e.g. 4096x14336, or of a convolution OUTPUTSxCHANNELSxHEIGHTxWIDTH; may be repeated."
SHORTLIST_HELP = "File of ranked tiles: written with a described card, the only tiles that are timed on a GPU."
ROWS = [1, 16, 64, 256, 1024]
FOLDER = Path("golden-stick-tuning")
PROCESSES = 16  # that compile, at most
PLANES = {1: 1, 2: 4, 4: 16}  # of SLB's logits, by bits
Sizes: TypeAlias = tuple[int, ...]  # (N, K) of a linear, (O, C / groups, R, S, groups) of a convolution
Named: TypeAlias = tuple[str, Problem]


def parse_layer(text: str) -> Sizes:
    """Parses `4096x14336` as (N, K), outputs by inputs; `64x32x3x3` as (64, 32, 3, 3, 1), a weight of a convolution."""
    sizes = text.lower().split("x")
    if len(sizes) not in (2, 4) or not all(size.isdigit() for size in sizes):
        raise ValueError(
            f"tune: --layer must be OUTPUTSxINPUTS, e.g. 4096x14336, or OUTPUTSxCHANNELSxHEIGHTxWIDTH, got {text!r}"
        )
    return tuple(map(int, sizes)) + ((1,) if len(sizes) == 4 else ())


def layers_of(net: nn.Module, example: Tensor) -> list[tuple[Sizes, int]]:
    """Lists the linears and convolutions that a call runs, each with its rows: of x, or pixels of y."""
    found: dict[tuple[Sizes, int], None] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            found[tuple(layer.weight.shape), y.numel() // layer.out_features] = None
        elif isinstance(layer, nn.Conv2d):
            found[(*layer.weight.shape, layer.groups), y.numel() // layer.out_channels] = None

    handles = [layer.register_forward_hook(note) for layer in net.modules()]
    try:
        with torch.inference_mode():
            net.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def problems_of(sizes: Sizes, rows: int, bits: Iterable[int], x_bits: Iterable[int], training: bool) -> Iterator[Named]:
    """Yields what kernels must compute for a layer: for each number of bits of its weight and of x, and to train it."""
    o, taps = sizes[0], sizes[1:4]
    k = math.prod(taps)
    for b, x in itertools.product(bits, x_bits):
        if len(sizes) == 5:
            groups = sizes[4]
            yield "qconv2d", {"m": rows, "n": o // groups, "k": k, "groups": groups, "channels": sizes[1], "x_bits": x}
        elif x == 16:
            yield "qmatmul", {"m": rows, "n": o, "k": k, "bits": b}
        else:
            yield "qmatmul_int8", {"m": rows, "n": o, "k": k, "group": 0 if b == 8 or k % 128 else 128}
    if training:
        # weights by row and x by tensor, in fp32 as they are trained
        yield "fake_quant", {"by": 1, "n": o * k}
        yield "fake_quant", {"by": 0, "n": rows * sizes[1]}
        for planes in (PLANES[b] for b in bits if b in PLANES):
            yield "slb", {"planes": planes, "itemsize": 4, "n": o * k}
            yield "slb_update", {"planes": planes, "itemsize": 4, "n": o * k}


def once(problems: Iterable[Named], console: Console, *, strict: bool) -> list[Named]:
    """Returns each problem once; those that kernels do not take raise if strict, else are printed and left out."""
    found: dict[tuple[Any, ...], Named] = {}
    for op, problem in problems:
        try:
            find_space(op).check(problem)
        except ValueError as error:
            if strict:
                raise
            console.print(f"left out: {error}")
            continue
        found[(op, *problem.values())] = op, problem
    return list(found.values())


def run_tune(
    layers: Sequence[tuple[Sizes, int]],
    bits: list[int],
    x_bits: list[int],
    training: bool,
    device: str,
    keep: int,
    jobs: int,
    out: Path | None,
    shortlist: Path | None,
    console: Console,
    *,
    strict: bool = True,
) -> None:
    """Finds or predicts the best tiles for all layers. layers: each with its rows."""
    named = (p for sizes, rows in layers for p in problems_of(sizes, rows, bits, x_bits, training))
    # kernels are compiled by op and width: neighbours share them
    problems = sorted(once(named, console, strict=strict), key=lambda p: (p[0], tuple(p[1].values())[::-1]))
    device, jobs = device or "cuda", jobs or min(PROCESSES, os.cpu_count() or 1)
    if device in CARDS:
        if shortlist is None:
            _predict(problems, device, keep, jobs, console)
        else:
            _rank(problems, device, keep, jobs, shortlist, console)
        return
    kind = device.partition(":")[0]
    if kind != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"tune: needs an NVIDIA GPU to time kernels, got {device} where torch sees "
            f"{torch.cuda.device_count()}; --device {', '.join(CARDS)} ranks tiles by a model and writes nothing"
        )
    path = (out or tuning_dir() or FOLDER) / file_name(capabilities(torch.device(device).index or 0).name)
    lists = [] if shortlist is None else read_lists(shortlist)
    with _bar() as progress:
        table = tune(problems, path, device=device, keep=keep, jobs=jobs, progress=progress, lists=lists)
    lines = Lines("problem", "us", "tile")
    for op, entries in table.ops.items():
        for entry in entries:
            lines.add_row(name_of(op, entry.problem), f"{entry.us:.1f}", find_space(op).describe(entry.tile))
    console.print(lines)
    console.print(f"{path} is read where GS_TUNING_DIR={path.parent} is set")


def _rank(problems: list[Named], device: str, keep: int, jobs: int, path: Path, console: Console) -> None:
    card = find_card(device)
    with _bar() as progress:
        lists = rank_lists(problems, card, keep=keep, jobs=jobs, progress=progress)
    write_lists(path, card.name, lists)
    tiles = sum(len(one.tiles) for one in lists)
    console.print(f"{path}: {tiles} tiles of {len(lists)} problems, ranked by a model of {card.name}; none was timed")


def _predict(problems: list[Named], device: str, keep: int, jobs: int, console: Console) -> None:
    static = Static(find_card(device))
    card = static.card
    console.print(f"No GPU is timed: what the cost model predicts for {card.name}, compiled for {card.target}.")
    with compilers(card, jobs) as predict:
        for op, problem in problems:
            space = find_space(op)
            with _bar() as progress:
                ranking = static.rank(op, problem, keep, progress, predict)
            lines = Lines("predicted us", "tile", title=name_of(op, problem))
            for ranked in ranking.tiles[:keep]:
                lines.add_row(f"{ranked.us:.1f}", space.describe(ranked.tile))
            console.print(lines)
            default = space.default(problem, static.machine)
            known = [f"{ranked.us:.1f} us" for ranked in ranking.tiles if ranked.tile == default] or ["not compared"]
            pruned = ", ".join(f"{n} {why}" for why, n in ranking.pruned.items()) or "none"
            console.print(f"Without a table: {space.describe(default)}: {known[0]}. Left out: {pruned}.")


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)
