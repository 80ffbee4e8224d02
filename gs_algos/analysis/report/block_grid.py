"""Draws a network that repeats its blocks as a grid: a row for each layer of a block, a column for each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gs_algos.analysis.report import svg
from gs_algos.analysis.report.layer_groups import ROLES, Blocks
from gs_algos.analysis.report.markup import Html

COLUMNS = 120  # blocks in a picture
OUTSIDE = 12  # layers outside of all blocks in a picture
MANY = 60  # layers above which blocks are drawn in a grid
GRID = "A column is a block of the network, by its number;"


def block_grid(title: str, sites: Sequence[str], found: Blocks, cell: Callable[[list[int]], svg.Cell]) -> Html:
    """Draws a grid of what layers are in their blocks by number; those outside of the blocks lie in column one.

    Of many blocks every second, third, ... is drawn.
    """
    numbers = found.numbers[:: math.ceil(len(found.numbers) / COLUMNS)]
    outside = found.others[:OUTSIDE]
    rows = [*found.roles[: 2 * ROLES], *(sites[i] for i in outside)]
    inside = len(rows) - len(outside)

    def at(row: int, column: int) -> svg.Cell | None:
        if row < inside:
            indices = found.at.get((rows[row], numbers[column]), [])
        else:
            indices = [outside[row - inside]] if column == 0 else []
        return cell(indices) if indices else None

    return svg.grid(title, rows, [str(n) for n in numbers], at)
