"""Cuts the Kronecker factors of a Hadamard matrix to what tensor cores multiply, and rows to programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gs_kernels.hadamard.matrices import factors

LEAST, MOST = 16, 128  # orders of a factor
ELEMENTS = 4096  # of a program that could take fewer rows
HELD = 32768  # elements that a program can hold: 64 per thread of 16 warps


@dataclass(frozen=True)
class Tile:
    """Describes what one program does: `rows` of `blocks` matrices of order `small * prod(radices)`.

    small: order of the first factor, which is read from memory; it and `blocks` are padded to a power of two.
    radices: orders of the factors behind it, Sylvester's: powers of two from 16 on.
    """

    rows: int
    blocks: int
    padded_blocks: int
    small: int
    padded: int
    radices: tuple[int, ...]
    warps: int

    @property
    def power(self) -> int:
        power = 1
        for radix in self.radices:
            power *= radix
        return power


@lru_cache(maxsize=1024)
def choose_tile(n: int, blocks: int) -> Tile | None:
    """Returns the tile of rows that hold `blocks` blocks of order n each; None if no program can hold one."""
    m, power = factors(n) or (n, 1)
    if power < LEAST:  # too small for a factor of its own
        m, power = m * power, 1
    bits = power.bit_length() - 1
    count = bits // 4  # of factors: 16 takes the fewest products for each value
    radices = tuple(2 ** ((bits + i) // count) for i in range(count))
    padded = 1 if m == 1 else max(LEAST, _power_of_two(m))
    if m == 1 and not radices:
        padded = LEAST
    held = _power_of_two(blocks) * padded * power
    if padded > MOST or held > HELD:
        return None
    rows = max(1, ELEMENTS // held)
    warps = 4 if rows * held <= 4096 else 8 if rows * held <= 8192 else 16
    return Tile(rows, blocks, _power_of_two(blocks), m, padded, radices, warps)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
