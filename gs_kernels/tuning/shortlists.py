"""Keeps tiles that were ranked by machine code where there is no GPU, for a GPU that only times them.

A short list is made by `gs_kernels.tuning.tuner.rank_lists` and taken by `tune`: compiling and ranking a hundred tiles
of a problem takes minutes, timing the best of them a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gs_kernels.runtime.files import write_whole
from gs_kernels.tuning.space import Problem, Tile
from gs_kernels.tuning.tables import check_problem, check_tile

FORMAT = 1


@dataclass(frozen=True)
class ShortList:
    """Holds the tiles of a problem that are worth timing, the most promising first."""

    op: str
    problem: Problem
    tiles: tuple[Tile, ...]


def write_lists(path: Path, card: str, lists: Sequence[ShortList]) -> None:
    """Writes all or nothing. card: the name of the GPU that they were ranked for."""
    entries = [{"op": one.op, "problem": one.problem, "tiles": list(one.tiles)} for one in lists]
    write_whole(path, (json.dumps({"format": FORMAT, "card": card, "lists": entries}, indent=1) + "\n").encode())


def read_lists(path: Path) -> list[ShortList]:
    """Reads what `write_lists` wrote.

    Raises:
        ValueError: if the file holds no short lists, or of another format, or a tile is out of the space of its op.
    """
    who = f"gs_kernels.tuning: {path}"
    try:
        data = json.loads(path.read_text())
        found, entries = data["format"], [(e["op"], dict(e["problem"]), list(e["tiles"])) for e in data["lists"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{who} must hold short lists, got {error!r}; rank tiles again") from error
    if found != FORMAT:
        raise ValueError(f"{who} must have format {FORMAT}, got {found}; rank tiles again")
    lists = []
    for number, (op, problem, tiles) in enumerate(entries):
        where = f"{who}: list {number}"
        lists.append(ShortList(op, check_problem(where, op, problem), tuple(check_tile(where, op, t) for t in tiles)))
    return lists
