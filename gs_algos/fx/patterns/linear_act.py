"""Matches Linear [+ BatchNorm1d on a [M, N] output] [+ activation]; the activation may be a function."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx.patterns.base import Match, Refusal, View
from gs_algos.fx.patterns.layer_pattern import LayerPattern, find

PATTERN = LayerPattern(name="linear_act", role="linear", layers=("linear",))


def search(view: View) -> Iterator[Match | Refusal]:
    yield from find(PATTERN, view)
