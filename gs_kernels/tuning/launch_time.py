"""Predicts how long a launch takes whose programs all do the same, from what one of them does.

One function for the cost model, which reads that from machine code, and for rules of tiles, which know it roughly.
What it assumes, none of it measured on kernels of ours:

- Programs that run at a time wait for as many bytes each, so memory serves each as fast, wherever it runs: an SM with
  two is served twice as fast as one with one, and SMs without any cost nothing while the others ask for enough.
- But no SM gets more than its port to L2 carries, and all of them together no more than L2 gives.
- Programs of a loop begin together and end together: those of a last wave that is not full share memory alone.
- An SM issues for its programs in turn. One alone takes no less than the instructions of a warp, one after the other,
  and what a turn waits for a barrier, shared memory and a product.
- Products hide the instructions of other programs. Where an SM holds one program, they hide half of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gs_kernels.tuning.gpu_specs import Card

ALONE = 2.0  # cycles between two instructions of a warp that waits for no other. No number of a data sheet
HIDDEN = 0.5  # of the instructions of a program that has its SM to itself, behind its products. Not measured either
TURN = 200.0  # cycles that a turn of a loop of products waits beside its instructions. No number of a data sheet


@dataclass(frozen=True)
class Program:
    """Describes what each program of a launch does. Times are of a program that has its SM to itself.

    memory: bytes from and to memory. through_l2: all that it loads and stores. waiting: bytes from memory that are on
    their way at a time. issue_us: of its instructions at the rate of an SM. alone_us: less than which they never take.
    loops: whether it goes through its bytes in a loop.
    """

    memory: float
    through_l2: float
    waiting: float
    products_us: float
    issue_us: float
    alone_us: float = 0.0
    loops: bool = True


@dataclass(frozen=True)
class Times:
    """Holds microseconds, without the launch."""

    bytes_us: float
    products_us: float
    instructions_us: float

    @property
    def us(self) -> float:
        return max(self.bytes_us, self.products_us, self.instructions_us)


def launch_times(count: int, held: int, program: Program, card: Card) -> Times:
    """Predicts `count` programs, of which an SM of the card holds `held` at a time."""
    busiest, room = -(-count // card.sm_count), held * card.sm_count

    def memory_us(programs: int) -> float:
        if programs == 0 or program.memory == 0:
            return 0.0
        rate = min(card.bandwidth * 1e3, min(programs, room) * program.waiting / card.latency_us)
        return programs * program.memory / rate

    full = count // room * room if program.loops else 0
    bytes_us = max(
        memory_us(full) + memory_us(count - full),
        count * program.through_l2 / card.l2_bandwidth / 1e3,
        busiest * program.through_l2 / (card.port * card.clock * 1e3),
    )
    unhidden = (1 - HIDDEN) * program.issue_us if held == 1 and program.loops and program.products_us else 0.0
    return Times(
        bytes_us=bytes_us,
        products_us=busiest * (program.products_us + unhidden),
        instructions_us=max(busiest * program.issue_us, math.ceil(busiest / held) * program.alone_us),
    )
