"""Decides by predicted time whether each program computes a tile, or all take equal shares of the blocks of all tiles.

`launch_times` predicts both, as the cost model does of compiled kernels: here with what is roughly so of all of them.
`bench.layers` holds the decisions against what the machine code of either is predicted to take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gs_kernels.tuning.gpu_specs import Card
from gs_kernels.tuning.launch_time import ALONE, TURN, Program, launch_times

SHORTEST = 3  # blocks of a share: what a pipeline of four stages loads before it multiplies
MOST_TILES = 8  # of rows: with more, each is a tile
COUNTS = (*range(1, MOST_TILES + 1), 10, 12, 14, 16, 32, 64, 128)  # of tiles of rows that are told apart


@dataclass(frozen=True)
class Code:
    """Counts the machine code of a kernel.

    issued: instructions a weight in its loop, as `Report.per_element` has them. beside: of a warp, around the loop.
    held: how many programs an SM holds; 0 if the code spills: only a tile that was timed runs it.
    """

    issued: float
    beside: int
    held: int


@dataclass(frozen=True)
class Tile:
    """Describes a tile whose loop takes 128 elements of K a turn.

    rows: of x, cols: of the weight. x_bytes, weight_bytes: of an element. kind: of products, as `Card.peaks` has it.
    stages: of the pipeline; x_stages: those that shared memory has room for in x.
    adding: instructions of a warp that adds parts of a tile, beside 22 a part.
    alone, shared: its code where a program does a tile, and where it does a share of all.
    """

    rows: int
    cols: int
    x_bytes: int
    weight_bytes: float
    kind: str
    warps: int
    stages: int
    x_stages: int
    adding: int
    alone: Code
    shared: Code

    def program(
        self, code: Code, blocks: int, memory: float, beside_memory: float, beside_l2: float, card: Card
    ) -> Program:
        """Returns a program that takes so many blocks, with bytes beside them.

        memory: bytes of its blocks that no other program reads, so that they come from memory.
        """
        weight, x = 128 * self.cols * self.weight_bytes, 128 * self.rows * self.x_bytes
        issued = blocks * code.issued * 128 * self.cols / 32 + code.beside * self.warps
        memory, through_l2 = memory + beside_memory, blocks * (weight + x) + beside_l2
        return Program(
            memory=memory,
            through_l2=through_l2,
            waiting=((self.stages - 1) * weight + self.x_stages * x) * min(1.0, memory / through_l2),
            products_us=blocks * 2 * 128 * self.cols * self.rows * card.sm_count / card.peaks[self.kind] / 1e6,
            issue_us=issued / card.issue_rate * 1e6,
            alone_us=(ALONE * issued / self.warps + TURN * blocks) / card.clock / 1e3,
        )


@dataclass(frozen=True)
class Split:
    """Says who computes what. shares: programs that take equal shares, 0 if each does a tile.

    per_sm: how many of them are for one SM. us: predicted, with the launches.
    """

    shares: int
    per_sm: int
    us: float


@lru_cache(maxsize=4096)
def split(
    tile: Tile, tiles_m: int, tiles_n: int, blocks: int, rows: int, per_sm: int, card: Card, early: bool, always: bool
) -> Split:
    """Chooses what is done soonest: a tile each, or shares with one program an SM, or more.

    Args:
        tiles_m, tiles_n, blocks: how many tiles of rows and of columns there are, and how many blocks of each along K.
        rows: of a tile that there are at most.
        per_sm: the most programs that an SM should get; 0 if shares are not wanted.
        early: whether what adds the parts may be launched while they are made.
        always: whether shares are taken wherever there are blocks for them: they have been timed.
    """
    sms, tiles, y = card.sm_count, tiles_m * tiles_n, 2 * rows * tile.cols
    work, found = tiles * blocks, []
    # what tiles have in common is read from memory once
    operands = work * 128 * (tile.cols * tile.weight_bytes / tiles_m + tile.rows * tile.x_bytes / tiles_n)
    whole = tile.program(tile.alone, blocks, operands / tiles, y, y, card)
    best = Split(0, 1, card.launch_us + launch_times(tiles, max(tile.alone.held, 1), whole, card).us)
    for each in range(per_sm, 0, -1):
        programs = min(sms, work // SHORTEST) if each == 1 else each * sms
        if programs == 0 or work < SHORTEST * programs or not (tile.shared.held or always):
            continue
        most, parts = parts_of(tiles, blocks, programs), 4 * rows * tile.cols * (tiles + programs)
        spilled = parts if parts > card.l2_bytes // 2 else 0  # from L2 to memory, and back
        part = tile.program(
            tile.shared, -(-work // programs), operands / programs, spilled / programs, parts / programs, card
        )
        us = card.launch_us + launch_times(programs, max(tile.shared.held, 1), part, card).us
        us += card.early_us if early else card.launch_us
        us += max(
            (tiles * y + spilled) / card.bandwidth / 1e3,
            tiles * (y + 4 * rows * tile.cols * most) / card.l2_bandwidth / 1e3,
            -(-tiles * -(-rows // 4) // sms) * 4 * (tile.adding + 22 * most) / card.issue_rate * 1e6,
        )
        found.append(Split(programs, each, us))
    if always and found:
        return found[0]
    return min([best, *found], key=lambda one: one.us)


def parts_of(tiles: int, blocks: int, shares: int) -> int:
    """Counts the programs, at most, whose shares meet in one of `tiles` tiles of `blocks` blocks along K."""
    return min((blocks - 1) * shares // (tiles * blocks) + 2, blocks)


def tiles_of_rows(m: int, block_m: int) -> int:
    """Returns the least of `COUNTS` such that m rows are no more tiles, the last if they are more; compares m only."""
    return next((count for count in COUNTS if m <= count * block_m), COUNTS[-1])
