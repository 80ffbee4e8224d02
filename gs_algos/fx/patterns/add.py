"""Matches residual and other additions of two activations (`x + y`, `torch.add`, in place too)."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx.patterns.base import Match, View
from gs_algos.fx.patterns.join import find


def search(view: View) -> Iterator[Match]:
    yield from find("add", view)
