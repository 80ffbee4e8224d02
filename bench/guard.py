"""Finds figures that depend on nothing but the code and got worse: rows measured now against rows that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# by how much a figure may grow before it counts: a share of it, and units. What is not named may not grow at all
SLACK: dict[str, tuple[float, int]] = {
    "registers": (0.0, 8),  # what one allocation unit of a warp is
    "instructions": (0.03, 4),
    "loop_instructions": (0.03, 4),
    "shared_bytes": (0.0, 1024),
    "spills": (0.0, 0),
    "nbytes": (0.0, 0),
    "launches": (0.0, 0),
    "calls": (0.0, 0),
    "saved_bytes": (0.0, 0),
}
KEYS = ("case", "kernel", "target", "network", "algorithm")
VERSIONS = ("torch", "triton")
ACCEPT = "accept it with `python -m bench.static`"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS if key in row)


def worse(kept: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each figure that grew by more than `SLACK` and each row that is gone; new rows are fine.

    Rows made with other versions of torch or triton say nothing about our code: then there is nothing to compare.
    """
    before, after = ({_key(row): row for row in rows} for rows in (kept, now))
    made = {tuple(row.get(v) for v in VERSIONS) for row in (*before.values(), *after.values())}
    if len(made) > 1:
        return []
    sentences = []
    for key in sorted(before.keys() | after.keys()):
        name = " ".join(key)
        if key not in after:
            sentences.append(f"{name}: is kept, and is no longer there; {ACCEPT}")
        elif key in before:
            sentences += [f"{name}: {fact}; {ACCEPT}" for fact in _grown(before[key], after[key])]
    return sentences


def _grown(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    facts = []
    for figure, (share, units) in SLACK.items():
        if figure in before:
            most = before[figure] + max(share * before[figure], units)
            if after[figure] > most:
                facts.append(f"{figure} must be at most {most:g}, got {after[figure]}, was {before[figure]}")
    held = "warps_per_sm"
    if held in before and after[held] < before[held]:
        facts.append(f"{held} must be at least {before[held]}, got {after[held]}")
    return facts
