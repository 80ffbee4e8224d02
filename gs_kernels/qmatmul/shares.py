"""Decides by predicted time whether each program computes a tile, or all take equal shares of the blocks of all tiles.

`launch_times` predicts both, as the cost model does of compiled kernels: here with what is roughly so of all of them.
`bench.layers` holds the decisions against what the machine code of either is predicted to take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from gs_kernels.tuning.gpu_specs import Card
from gs_kernels.tuning.launch_time import ALONE, TURN, Program, launch_times

SHORTEST = 3  # blocks of a share: what a pipeline of four stages loads before it multiplies
MOST_TILES = 8  # of rows: with more, each is a tile
BESIDE_TILE, BESIDE_SHARE = 270, 520  # instructions of a warp around its loops
REGISTERS = 65536  # of an SM


@dataclass(frozen=True)
class Tile:
    """Describes a tile whose loop takes 128 elements of K a turn.

    rows: of x, cols: of the weight. x_bytes, weight_bytes: of an element. kind: of products, as `Card.peaks` has it.
    issued: instructions a weight, as `Report.per_element` counts them. registers: of a thread, beside the sums.
    stages: of the pipeline.
    """

    rows: int
    cols: int
    x_bytes: int
    weight_bytes: float
    kind: str
    issued: float
    registers: int
    warps: int
    stages: int

    @property
    def held(self) -> int:
        """Returns how many programs an SM holds."""
        threads = 32 * self.warps
        return max(1, REGISTERS // threads // (self.registers + self.rows * self.cols // threads))

    def turn(self, card: Card) -> Program:
        """Returns what one block of a program takes."""
        weight, x = 128 * self.cols * self.weight_bytes, 128 * self.rows * self.x_bytes
        issued = self.issued * 128 * self.cols / 32
        return Program(
            memory=weight,
            through_l2=weight + x,
            waiting=(self.stages - 1) * weight,
            products_us=2 * 128 * self.cols * self.rows * card.sm_count / card.peaks[self.kind] / 1e6,
            issue_us=issued / card.issue_rate * 1e6,
            alone_us=(ALONE * issued / self.warps + TURN) / card.clock / 1e3,
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
def split(tile: Tile, tiles: int, blocks: int, rows: int, per_sm: int, card: Card, early: bool, always: bool) -> Split:
    """Chooses what is done soonest: a tile each, or shares with one program an SM, or more.

    Args:
        tiles, blocks: how many there are, and of each along K.
        rows: of a tile that there are at most.
        per_sm: the most programs that an SM should get; 0 if shares are not wanted.
        early: whether what adds the parts may be launched while they are made.
        always: whether shares are taken wherever there are blocks for them: they have been timed.
    """
    turn, sms, y = tile.turn(card), card.sm_count, 2 * rows * tile.cols
    whole = _program(turn, blocks, BESIDE_TILE, tile.warps, card, memory=y, through_l2=y)
    best = Split(0, 1, card.launch_us + launch_times(tiles, tile.held, whole, card).us)
    work, found = tiles * blocks, []
    for each in range(per_sm, 0, -1):
        programs = min(sms, work // SHORTEST) if each == 1 else each * sms
        if programs == 0 or work < SHORTEST * programs:
            continue
        parts = 4 * rows * tile.cols * (tiles + programs)
        blocks_each = -(-work // min(programs, sms)) / each
        spilled = parts if parts > card.l2_bytes // 2 else 0  # from L2 to memory, and back
        part = _program(
            turn, blocks_each, BESIDE_SHARE, tile.warps, card, memory=spilled / programs, through_l2=parts / programs
        )
        us = card.launch_us + launch_times(programs, tile.held, part, card).us
        us += card.early_us if early else card.launch_us
        us += max((tiles * y + spilled) / card.bandwidth, (tiles * y + parts) / card.l2_bandwidth) / 1e3
        found.append(Split(programs, each, us))
    if always and found:
        return found[0]
    return min([best, *found], key=lambda one: one.us)


def _program(
    turn: Program, blocks: float, beside: int, warps: int, card: Card, memory: float = 0.0, through_l2: float = 0.0
) -> Program:
    """Returns a program of so many turns, with instructions and bytes beside them."""
    return replace(
        turn,
        memory=blocks * turn.memory + memory,
        through_l2=blocks * turn.through_l2 + through_l2,
        products_us=blocks * turn.products_us,
        issue_us=blocks * turn.issue_us + beside * warps / card.issue_rate * 1e6,
        alone_us=blocks * turn.alone_us + ALONE * beside / card.clock / 1e3,
    )


def tiles_of_rows(m: int, block_m: int) -> int:
    """Returns how many tiles m rows are, 0 if more than `MOST_TILES`; compares m only."""
    return next((count for count in range(1, MOST_TILES + 1) if m <= count * block_m), 0)
