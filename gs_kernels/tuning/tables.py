"""Reads and writes tables of tuned tiles, `<gpu>.json` in `GS_TUNING_DIR`, else in `gs_kernels/tuning/tables`.

A table lists, for each space (`gs_kernels.tuning.space`), problems with the tile that was fastest. What is not in it
gets the nearest entry: see `nearest`. A table is checked when it is read; one that is wrong raises, and never falls
back in silence.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from gs_kernels.runtime import bound_calls
from gs_kernels.runtime.device import capabilities
from gs_kernels.runtime.dispatch import tuning_dir
from gs_kernels.runtime.files import write_whole
from gs_kernels.tuning.space import Problem, Space, Tile, find_space, spaces

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
LAST = 1 << 62  # rows: more than any


@dataclass(frozen=True)
class Entry:
    """Holds the tile of a problem, and the microseconds (us) that it took."""

    problem: Problem
    tile: Tile
    us: float


@dataclass(frozen=True)
class Table:
    """Holds the entries of each op. gpu: as its driver says it. made_with: versions."""

    gpu: str
    sm: int
    sm_count: int
    made_with: dict[str, str]
    ops: dict[str, tuple[Entry, ...]]

    def replaced(self, op: str, entry: Entry) -> Table:
        """Returns a table with this entry for its problem."""
        others = [e for e in self.ops.get(op, ()) if e.problem != entry.problem]
        entries = sorted([*others, entry], key=lambda e: tuple(e.problem.values()))
        return Table(self.gpu, self.sm, self.sm_count, self.made_with, {**self.ops, op: tuple(entries)})


def check_problem(who: str, op: str, problem: Any) -> Problem:
    """Returns the sizes in the order of the space.

    Raises:
        ValueError: if there is no such op, or the sizes are not those of its space.
    """
    if op not in spaces():
        raise ValueError(f"{who}: op must be one of {', '.join(spaces())}, got {op!r}")
    space = find_space(op)
    if set(problem) != set(space.sizes) or not all(type(v) is int and v >= 0 for v in problem.values()):
        raise ValueError(f"{who}: problem must have {', '.join(space.sizes)}, all >= 0, got {problem}; tune again")
    return {name: problem[name] for name in space.sizes}


def check_tile(who: str, op: str, tile: Any) -> Tile:
    """Raises ValueError if the tile is not in the space of the op, else returns it."""
    space = find_space(op)
    if set(tile) != set(space.choices):
        raise ValueError(f"{who}: tile must have {', '.join(space.choices)}, got {', '.join(tile)}; tune again")
    for name, values in space.choices.items():
        if type(tile[name]) is not type(values[0]) or tile[name] not in values:
            raise ValueError(f"{who}: {name} must be one of {list(values)}, got {tile[name]!r}; tune again")
    return dict(tile)


def _check(where: str, op: str, number: int, entry: Any) -> Entry:
    who = f"gs_kernels.tuning: {where}: entry {number} of {op}"
    if op not in spaces():
        raise ValueError(f"gs_kernels.tuning: {where}: op must be one of {', '.join(spaces())}, got {op!r}")
    if not isinstance(entry, dict) or set(entry) != {"problem", "tile", "us"}:
        raise ValueError(f"{who}: must have problem, tile and us, got {entry!r}; tune again")
    problem = check_problem(who, op, entry["problem"])
    return Entry(problem, check_tile(who, op, entry["tile"]), float(entry["us"]))


def read_table(path: Path) -> Table:
    """Raises:
    ValueError: if the file is no table, or of another format, or an entry is out of the space of its op.
    """
    try:
        data = json.loads(path.read_text())
        about = data["gpu"], data["sm"], data["sm_count"], data["made_with"]
        ops, found = data["ops"], data["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"gs_kernels.tuning: {path} must be a table of tiles, got {error!r}; tune again") from error
    if found != FORMAT:
        raise ValueError(f"gs_kernels.tuning: {path} must have format {FORMAT}, got {found}; tune again")
    checked = {op: tuple(_check(str(path), op, i, e) for i, e in enumerate(entries)) for op, entries in ops.items()}
    return Table(*about, checked)


def write_table(path: Path, table: Table) -> None:
    """Writes the whole table or nothing: another process never reads half a table."""
    ops = {op: [{"problem": e.problem, "tile": e.tile, "us": e.us} for e in es] for op, es in table.ops.items()}
    head = {"format": FORMAT, "gpu": table.gpu, "sm": table.sm, "sm_count": table.sm_count}
    data = {**head, "made_with": table.made_with, "ops": ops}
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def file_name(gpu: str) -> str:
    """Makes the name of a GPU's table: `file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def folders() -> list[Path]:
    """Lists the folders of tables, the first to look in first.

    Raises:
        ValueError: if GS_TUNING_DIR names what is no folder.
    """
    mine = tuning_dir()
    if mine is not None and not mine.is_dir():
        raise ValueError(f"gs_kernels.tuning: GS_TUNING_DIR must be a folder, got {mine}; make it or unset it")
    return [folder for folder in (mine, SHIPPED) if folder is not None]


@cache
def find_table(sm: int, sm_count: int) -> Table | None:
    """Finds the table of GPUs with this compute capability and so many processors; reads tables once a process.

    It is the present GPU's by name, if there is one, else the first by file name.
    """
    tables = [read_table(path) for folder in folders() for path in sorted(folder.glob("*.json"))]
    fitting = [table for table in tables if (table.sm, table.sm_count) == (sm, sm_count)]
    present = capabilities(torch.cuda.current_device()).name if fitting and torch.cuda.is_available() else ""
    return next((table for table in fitting if table.gpu == present), fitting[0] if fitting else None)


def nearest(table: Table, space: Space, sizes: Problem) -> list[tuple[int, Entry]]:
    """Lists entries by rows ascending, each with the largest number of rows that it is for; empty if there are none.

    Of those with the same exact sizes, the ones whose near sizes are nearest: by the sum of |log2| of the ratios, the
    smaller sizes first if two are as near. An entry is for what is nearer to its rows than to the next, by ratio.

    Args:
        sizes: all of a problem but its rows.
    """
    fitting = [e for e in table.ops.get(space.op, ()) if all(e.problem[name] == sizes[name] for name in space.exact)]
    if not fitting:
        return []

    def distance(entry: Entry) -> tuple[float, list[int]]:
        pairs = [(entry.problem[name], sizes[name]) for name in space.near]
        return round(sum(abs(math.log2(a / b)) for a, b in pairs), 9), [a for a, _ in pairs]

    closest = min(map(distance, fitting))
    rows = sorted((e for e in fitting if distance(e) == closest), key=lambda e: e.problem[space.rows])
    ends = [math.isqrt(a.problem[space.rows] * b.problem[space.rows]) for a, b in itertools.pairwise(rows)]
    return list(zip([*ends, LAST], rows, strict=True))


_forced: dict[str, Tile] = {}


@contextmanager
def forced(op: str, tile: Tile) -> Iterator[None]:
    """Has this tile chosen inside the block, whatever the tables say: for the tuner."""
    _forced[op] = tile
    bound_calls.forget()
    try:
        yield
    finally:
        del _forced[op]
        bound_calls.forget()


def tuned(op: str, machine: tuple[int, int] | None, rows: int, **sizes: int) -> Tile | None:
    """Looks up the tile for a problem, None without a table. Compares rows only: a symbol is bounded, not fixed.

    Args:
        machine: compute capability and number of processors; None for the present GPU.
        rows: of the problem, by whatever name.
        sizes: the others.
    """
    if op in _forced:
        return _forced[op]
    machine = machine or present()
    if machine is None:
        return None
    return next((tile for last, tile in _tiles(op, *machine, tuple(sizes.items())) if rows <= last), None)


@cache
def present() -> tuple[int, int] | None:
    """Returns compute capability and number of processors of the GPU in use, None without one; asks once a process."""
    if not torch.cuda.is_available():
        return None
    gpu = capabilities(torch.cuda.current_device())
    return gpu.sm, gpu.sm_count


@lru_cache(maxsize=4096)
def _tiles(op: str, sm: int, sm_count: int, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[int, Tile], ...]:
    table = find_table(sm, sm_count)
    entries = nearest(table, find_space(op), dict(sizes)) if table else []
    return tuple((last, entry.tile) for last, entry in entries)


def forget() -> None:
    """Has tables read again."""
    find_table.cache_clear()
    _tiles.cache_clear()
    bound_calls.forget()
