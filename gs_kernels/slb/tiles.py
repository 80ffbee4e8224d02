"""How weights are cut into tiles, one per program. Pure Python; sizes may be symbols."""

from __future__ import annotations

from dataclasses import dataclass

from gs_kernels.fake_quant.tiles import power_of_two

VECTOR = 16  # bytes of one access of a thread
CHUNK = 16  # levels that a thread holds at once; more are mixed chunk by chunk
UPDATE_CHUNK = 4  # in an optimizer step, which holds the state of each level beside its logit
COLUMNS_MIN = 64  # of a row: whole 128-byte lines in 16-bit logits


@dataclass(frozen=True)
class Tile:
    """rows x cols weights, both powers of two, and `levels` planes of logits at a time, for `warps` warps."""

    rows: int
    cols: int
    levels: int
    warps: int

    def grid(self, o: int, r: int) -> tuple[int]:
        return (-(-o // self.rows) * -(-r // self.cols),)


def choose_tile(o: int, r: int, planes: int, itemsize: int, *, columns_min: int = 1, vectors_max: int = 2) -> Tile:
    """For a weight of o rows and r columns with `planes` planes of logits of `itemsize` bytes.

    vectors_max: accesses of a thread to each plane; few planes want more, so that enough bytes are on their way.
    """
    levels = power_of_two(planes, CHUNK)
    vectors = min(2 if levels <= 2 else 1, vectors_max)
    warps = 4 * vectors
    lanes = 32 * warps * vectors * VECTOR // itemsize
    cols = max(_columns(r, lanes), columns_min)
    return Tile(power_of_two(o, lanes // cols), cols, levels, warps)


def _columns(r: int, lanes: int) -> int:
    """The widest tile that wastes at most an eighth of its lanes, else the narrowest that is worth a line."""
    cols = power_of_two(r, lanes)
    while cols > COLUMNS_MIN and 8 * (-r % cols) > r:
        cols //= 2
    return cols
