"""Cuts rows into tiles, one per program, by a table or a rule. Pure Python; sizes may be symbols."""

from __future__ import annotations

from dataclasses import dataclass

from gs_kernels.fake_quant.strided_rows import BY_COL, BY_TENSOR, Rows
from gs_kernels.tuning.tables import tuned

ELEMENTS = 4096  # of a tile: 16 per thread, two 16-byte loads in bf16
WARPS = 8  # that share a whole tile; a smaller one takes at most SOME_WARPS
SOME_WARPS = 4
COLUMNS = 128  # of a tile by column: a sum leaves one number per tile and column, so tiles are high


@dataclass(frozen=True)
class Tile:
    """Describes a tile of rows x cols elements, both powers of two, for `warps` warps."""

    rows: int
    cols: int
    warps: int

    def grid(self, rows: Rows) -> tuple[int]:
        return (-(-rows.rows // self.rows) * -(-rows.cols // self.cols),)

    def partials(self, rows: Rows) -> tuple[int, ...]:
        """Returns the shape of what a reduction over tiles leaves: one number per tile and tensor, row or column."""
        if rows.by == BY_TENSOR:
            return self.grid(rows)
        if rows.by == BY_COL:
            return -(-rows.rows // self.rows), rows.cols
        return rows.rows, -(-rows.cols // self.cols)


def power_of_two(n: int, limit: int) -> int:
    """Returns the smallest power of two >= n, or limit. Compares only, so that a symbol is bounded and not fixed."""
    p = 1
    while p < limit and p < n:
        p *= 2
    return p


def choose_tile(rows: Rows) -> Tile:
    """Chooses the tile of all kernels that go over rows once, by where scales are, whatever the dtype."""
    tile = tuned("fake_quant", None, rows.rows * rows.cols, by=rows.by)
    elements, warps = (ELEMENTS, WARPS) if tile is None else (tile["elements"], tile["warps"])
    cols = power_of_two(rows.cols, COLUMNS if rows.by == BY_COL else elements)
    height = power_of_two(rows.rows, elements // cols)
    return Tile(height, cols, warps=warps if height * cols >= elements else min(warps, SOME_WARPS))
