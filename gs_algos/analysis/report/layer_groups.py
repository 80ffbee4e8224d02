"""Puts the layers of a deep network together: into a row of a table, or into a grid of blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

ROLES = 40  # names of layers in a block, above which numbers in them are left out
_NUMBER = re.compile(r"(?<![^.])\d{1,6}(?![^.])")  # a whole part of a dotted name


@dataclass(frozen=True)
class Blocks:
    """Holds layers by what they are in a block, and by the number of their block.

    Args:
        roles: names in which `*` stands for the number of the block, and for other numbers where there are many names.
        numbers: of the blocks, ascending.
        at: role and number -> indices of the layers.
        others: indices of layers outside of all blocks.
    """

    roles: tuple[str, ...]
    numbers: tuple[int, ...]
    at: dict[tuple[str, int], list[int]]
    others: tuple[int, ...]


def grouped(sites: Sequence[str], most: int) -> list[tuple[str, list[int]]]:
    """Returns rows of at most `most` layers each shown by itself, else of layers that differ in numbers of their names.

    The last number of a name goes first, so that the experts of a block become one row before blocks do. A row is a
    name, with `*` in place of numbers, and the indices of its layers. There may be more than `most` if names have no
    more numbers.
    """
    rows: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        rows.setdefault(site, []).append(i)
    while len(rows) > most and any(_NUMBER.search(name) for name in rows):
        merged: dict[str, list[int]] = {}
        for name, indices in rows.items():
            merged.setdefault(_without_last_number(name), []).extend(indices)
        rows = merged
    return list(rows.items())


def blocks(sites: Sequence[str]) -> Blocks | None:
    """Finds the blocks of a network that repeats them, such as `layers.0`, `layers.1`; None if it has none.

    The number counts with which most layers lie in blocks. These are four blocks at least, of two layers at least on
    average, with three quarters of all layers, and most layers are in half of the blocks at least.
    """
    found: dict[str, set[int]] = {}
    for site in sites:
        for part in islice(_NUMBER.finditer(site), 8):
            found.setdefault(site[: part.start()], set()).add(int(part.group()))
    best, most = None, 0
    for prefix, numbers in found.items():
        if len(numbers) < 4:
            continue
        one = _in_blocks(sites, prefix, numbers)
        inside = len(sites) - len(one.others)
        enough = inside >= 0.75 * len(sites) and inside >= 2 * len(numbers)
        if enough and inside > most and len(one.at) >= 0.5 * len(one.roles) * len(numbers):
            best, most = one, inside
    return best


def _in_blocks(sites: Sequence[str], prefix: str, numbers: set[int]) -> Blocks:
    """Sorts layers into the blocks whose names are a prefix and a number."""
    inside = re.compile(re.escape(prefix) + r"(\d{1,6})(?![^.])(.*)", re.DOTALL)
    matches = [inside.fullmatch(site) for site in sites]
    merge = len({match[2] for match in matches if match}) > ROLES
    at: dict[tuple[str, int], list[int]] = {}
    for i, match in enumerate(matches):
        if match:
            role = _NUMBER.sub("*", match[2]) if merge else match[2]
            at.setdefault((f"{prefix}*{role}", int(match[1])), []).append(i)
    roles = tuple(dict.fromkeys(role for role, _ in at))
    return Blocks(roles, tuple(sorted(numbers)), at, tuple(i for i, match in enumerate(matches) if not match))


def _without_last_number(name: str) -> str:
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        if _NUMBER.fullmatch(parts[i]):
            parts[i] = "*"
            break
    return ".".join(parts)
