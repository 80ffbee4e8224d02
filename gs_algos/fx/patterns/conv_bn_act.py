"""Matches Conv1d/2d/3d [+ BatchNorm] [+ ReLU, ReLU6, Hardswish, SiLU, GELU]; the activation may be a function."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx import op_names
from gs_algos.fx.patterns.base import Match, Refusal, View
from gs_algos.fx.patterns.layer_pattern import LayerPattern, find

PATTERN = LayerPattern(name="conv_bn_act", role="conv", layers=op_names.CONVS, refused=op_names.TRANSPOSED_CONVS)


def search(view: View) -> Iterator[Match | Refusal]:
    yield from find(PATTERN, view)
