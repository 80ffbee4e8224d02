"""Gives searches what they measure on: training images, a journal, and a bar that shows how far they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gs_algos.core.algorithm import Algorithm
from gs_algos.demo.data import ImageData
from gs_algos.search.driver import OnStep
from gs_algos.search.stage import Search

SAMPLES, BATCH = 512, 64  # training images that policies are measured on


def give_data(algorithm: Algorithm, data: ImageData, journal: Path) -> None:
    """Gives a search the training images that it measures on, and the file that it goes on from; others need none."""
    found: Any = algorithm
    while found is not None:
        if isinstance(found, Search):
            found.data, found.journal = training_inputs(data, SAMPLES), journal
        found = getattr(found, "inner", None)


def training_inputs(data: ImageData, samples: int) -> list[Tensor]:
    """Returns batches of training images as they are, drawn at random, always the same."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:samples]
    return list(data.normalize(data.train_x[order.to(data.train_x.device)]).split(BATCH))


@contextmanager
def best_so_far(what: str) -> Iterator[OnStep | None]:
    """Shows a progress bar on stderr with the best score so far, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[best]}"), console=console, transient=True) as progress:
        task = progress.add_task(what, best="")

        def on_step(done: int, total: int, best: float) -> None:
            progress.update(task, completed=done, total=total, best=f"best {best:.4g}")

        yield on_step
