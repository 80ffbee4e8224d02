"""Makes Hadamard matrices: square, entries 1 and -1, `H @ H^T = n * I`.

Orders are `m * 2^k`: the Kronecker product of a matrix of order m, 1 or one of Paley's, and Sylvester's of order 2^k.
Paley 1933, On orthogonal matrices: of a field with q elements, order q + 1 if q = 3 mod 4, 2 (q + 1) if q = 1 mod 4.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

MOST = 512  # that m can be: the product with its matrix takes m products for each value


@cache
def factors(n: int) -> tuple[int, int] | None:
    """Returns (m, 2^k) with the smallest m such that `n = m * 2^k` and there is a matrix of order m; None without."""
    twos = n & -n
    m = n // twos
    if m == 1:
        return 1, n
    while m <= min(n, MOST) and n % m == 0:
        if m % 4 == 0 and _field(m) is not None:
            return m, n // m
        m *= 2
    return None


@cache
def hadamard_block(k: int) -> int:
    """Returns the largest order of a Hadamard matrix that divides k: k itself where there is one, 1 at least."""
    return next(n for n in range(k, 0, -1) if k % n == 0 and factors(n) is not None)


def hadamard_matrix(n: int) -> Tensor:
    """Returns a Hadamard matrix, `[n, n]` fp32 of 1 and -1.

    Raises:
        ValueError: if none of order n is known here.
    """
    parts = factors(n) if n > 0 else None
    if parts is None:
        raise ValueError(
            f"hadamard: n must be m * 2^k with m 1, 12, 20, 28, 36, ..., got {n}; "
            f"the largest order that divides it is {hadamard_block(max(n, 1))}"
        )
    small, power = (torch.tensor(rows, dtype=torch.float32, device="cpu") for rows in (small_rows(parts[0]), [[1]]))
    while len(power) < parts[1]:  # Sylvester's
        power = torch.cat((torch.cat((power, power), 1), torch.cat((power, -power), 1)))
    return torch.kron(small, power)


@cache
def small_rows(m: int) -> list[list[float]]:
    """Returns the matrix of order m, 1 or one of Paley's, as numbers, which also a tracer takes; its first row is 1."""
    if m == 1:
        return [[1.0]]
    field = _field(m)
    assert field is not None
    residues = _residues(*field)
    q = len(residues)
    if m == q + 1:
        rows = [[0.0] + [1.0] * q, *([-1.0, *row] for row in residues)]
        return [[float(i == j) + value for j, value in enumerate(row)] for i, row in enumerate(rows)]
    rows = [[0.0] + [1.0] * q, *([1.0, *row] for row in residues)]
    one, other = ((1.0, 1.0), (1.0, -1.0)), ((1.0, -1.0), (-1.0, -1.0))
    matrix = [
        [(rows[i][j] * one[a][b] if i != j else other[a][b]) for j in range(q + 1) for b in range(2)]
        for i in range(q + 1)
        for a in range(2)
    ]
    return [[value * first for value, first in zip(row, matrix[0], strict=True)] for row in matrix]


@cache
def _field(m: int) -> tuple[int, int] | None:
    """Returns p and e of the field with p^e elements that gives a matrix of order m; None if there is none."""
    for q, rest in ((m - 1, 3), (m // 2 - 1, 1)):
        if q % 4 != rest or q < 3:
            continue
        p = next(p for p in range(3, q + 1) if q % p == 0)
        e, power = 1, p
        while power < q:
            e, power = e + 1, power * p
        if power == q:
            return p, e
    return None


def _residues(p: int, e: int) -> list[list[float]]:
    """Returns `[q, q]`: 1 where i - j is a square in the field of p^e elements, -1 where not, 0 on the diagonal."""
    elements = list(itertools.product(range(p), repeat=e))
    character = dict.fromkeys(elements, 0.0)
    for power, element in enumerate(_powers(p, e)):  # even powers of a generator are the squares
        character[element] = 1.0 - 2.0 * (power % 2)
    return [[character[tuple((a - b) % p for a, b in zip(x, y, strict=True))] for y in elements] for x in elements]


def _powers(p: int, e: int) -> list[tuple[int, ...]]:
    """Returns all elements but 0 as the powers of one of them: polynomials modulo the first that makes x a generator.

    Coefficients are those of x^(e - 1) to 1; a field of p elements has the modulus x - g.
    """
    one = (*[0] * (e - 1), 1)
    for modulus in itertools.product(range(p), repeat=e):  # x^e = modulus
        powers, element = [one], _times_x(one, modulus, p)
        while any(element) and element != one and len(powers) < p**e:
            powers.append(element)
            element = _times_x(element, modulus, p)
        if element == one and len(powers) == p**e - 1:
            return powers
    raise AssertionError(f"a field of {p}^{e} elements has a generator")


def _times_x(element: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    shifted = (*element[1:], 0)
    return tuple((a + element[0] * b) % p for a, b in zip(shifted, modulus, strict=True))
