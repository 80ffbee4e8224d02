"""Shows a progress bar for long loops: rich's where it is installed and the output is a terminal, otherwise nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields the items; shows how far it is once the loop has taken a moment."""
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if total in (0, 1):
        yield from items
        return
    with progress_bar(total, what) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress_bar(total: float | None, what: str) -> Iterator[Callable[[float], None]]:
    """Shows a bar while the block runs; what it yields is called with how much more of the total is done."""
    if not sys.stderr.isatty():
        yield _nothing
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _nothing
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _nothing(amount: float) -> None:
    pass
