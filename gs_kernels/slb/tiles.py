"""Cuts weights into tiles, one per program, by a table or a rule. Pure Python; sizes may be symbols."""

from __future__ import annotations

from dataclasses import dataclass

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.tuning.tables import tuned

VECTOR = 16  # bytes of one access of a thread
CHUNK = 16  # levels that a thread holds at once; more are mixed chunk by chunk
UPDATE_CHUNK = 4  # in an optimizer step, which holds the state of each level beside its logit
WARPS = 1  # a program of one waits for no other, and while some load and store others compute
UPDATE_WARPS = 4  # of an optimizer step, which waits for memory most of the time
COLUMNS_MIN = 64  # of a row: whole 128-byte lines in 16-bit logits


@dataclass(frozen=True)
class Tile:
    """Describes a tile of rows x cols weights, both powers of two, whose logits are read `levels` planes at a time."""

    rows: int
    cols: int
    levels: int
    warps: int

    def grid(self, o: int, r: int) -> tuple[int]:
        return (-(-o // self.rows) * -(-r // self.cols),)


def choose_tile(o: int, r: int, planes: int, itemsize: int, *, columns_min: int = 1, vectors_max: int = 2) -> Tile:
    """Chooses the tile of a weight of o rows and r columns with `planes` planes of logits of `itemsize` bytes.

    vectors_max: accesses of a thread to each plane; few planes want more, so that enough bytes are on their way. 1 for
        optimizer steps, which have tables of their own.
    """
    levels = power_of_two(planes, CHUNK)
    op = "slb" if vectors_max > 1 else "slb_update"
    tile = tuned(op, None, o * r, planes=planes, itemsize=itemsize)
    vectors, warps = default_threads(planes, vectors_max) if tile is None else (tile["vectors"], tile["warps"])
    elements = 32 * warps * vectors * VECTOR // itemsize
    cols = max(_columns(r, elements), columns_min)
    return Tile(power_of_two(o, elements // cols), cols, levels, warps)


def default_threads(planes: int, vectors_max: int) -> tuple[int, int]:
    """Returns the accesses of a thread to each plane, and the warps, without a table."""
    return (2 if planes <= 2 else 1, WARPS) if vectors_max > 1 else (1, UPDATE_WARPS)


def _columns(r: int, elements: int) -> int:
    """Returns the widest tile that wastes at most an eighth of its elements; COLUMNS_MIN if none does."""
    cols = power_of_two(r, elements)
    while cols > COLUMNS_MIN and 8 * (-r % cols) > r:
        cols //= 2
    return cols
