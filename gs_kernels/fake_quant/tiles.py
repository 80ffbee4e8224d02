"""Cuts rows into tiles, one per program, by a table or a rule. Pure Python; sizes may be symbols."""

from __future__ import annotations

from dataclasses import dataclass

from gs_kernels.fake_quant.strided_rows import BY_COL, BY_CYCLE, BY_ROW, BY_TENSOR, Rows
from gs_kernels.tuning.tables import tuned

# elements of a tile, and warps: 16 a thread, two 16-byte loads in bf16. Tiles are small, so that a processor holds many
# at a time: while some wait for memory others compute
ELEMENTS, WARPS = 2048, 4
COLUMN_ELEMENTS, COLUMN_WARPS = 4096, 8  # by column
SOME_WARPS = 4  # at most, of a tile that a small tensor does not fill
CHUNK = 64  # columns of a chunk: lines of 128 bytes in 16-bit elements, and a thread has several chunks of a row
COLUMNS = 128  # of a tile by column: a sum leaves one number per tile and column, so tiles are high


@dataclass(frozen=True)
class Tile:
    """Describes a tile of rows x cols elements, both powers of two, for `warps` warps."""

    rows: int
    cols: int
    warps: int

    def grid(self, rows: Rows) -> tuple[int]:
        return (-(-rows.rows // self.rows) * -(-rows.cols // self.cols),)

    def chunk(self, rows: Rows) -> int:
        """Returns the columns that neighboring threads share: all, but where a tile has several rows with scales."""
        return min(self.cols, CHUNK) if self.rows > 1 and rows.by in (BY_ROW, BY_CYCLE) else self.cols

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


def default_tile(by: int) -> tuple[int, int]:
    """Returns the elements of a tile, and its warps, without a table."""
    return (COLUMN_ELEMENTS, COLUMN_WARPS) if by == BY_COL else (ELEMENTS, WARPS)


def choose_tile(rows: Rows) -> Tile:
    """Chooses the tile of all kernels that go over rows once, by where scales are, whatever the dtype."""
    tile = tuned("fake_quant", None, rows.rows * rows.cols, by=rows.by)
    elements, warps = default_tile(rows.by) if tile is None else (tile["elements"], tile["warps"])
    cols = power_of_two(rows.cols, COLUMNS if rows.by == BY_COL else elements)
    height = power_of_two(rows.rows, elements // cols)
    return Tile(height, cols, warps=warps if height * cols >= elements else min(warps, SOME_WARPS))
