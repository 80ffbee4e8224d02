"""Makes tables in Markdown, and what several of them show in a cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Rows: TypeAlias = Sequence[dict[str, Any]]
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", None: "bf16"}


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)] + [[str(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shape_text(shape: dict[str, Any]) -> str:
    """Writes a shape as `x=64x4096 n=4096 bits=4`, without what has its usual value."""
    usual: dict[str, Any] = {"axis": -1, "group": 0, "padding": 0, "stride": 1, "dilation": 1, "groups": 1}
    usual |= {"learned": True, "zero": "middle", "activation": "none"}
    said = {k: v for k, v in shape.items() if v != usual.get(k) and v is not None and v is not False and v != "none"}
    return " ".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple | list) else v}" for k, v in said.items())


def last(rows: Rows, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Picks the last row of each combination of these keys, in the order in which the combinations came."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time", ""))):
        latest[tuple(str(row.get(key)) for key in keys)] = row
    return latest


def mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"


def rows_of(shape: dict[str, Any]) -> int:
    m = 1
    for size in shape["x"][:-1]:
        m *= size
    return m
