"""Matches concatenations of activations (`torch.cat`)."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx.patterns.base import Match, View
from gs_algos.fx.patterns.join import find


def search(view: View) -> Iterator[Match]:
    yield from find("cat", view)
