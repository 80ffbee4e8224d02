"""Shows a progress bar for long loops: rich's where it is installed and the output is a terminal, otherwise nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields the items; shows how far it is once the loop has taken a moment."""
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not sys.stderr.isatty() or total in (0, 1):
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from items
        return
    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)
