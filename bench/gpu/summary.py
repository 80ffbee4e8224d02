"""Prints the table that comes last, short enough to be all that somebody sees of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.account import Account
from bench.gpu.decoding import decode_lines

LENGTH = 10_000  # characters at most
LINE = "{:46} {:>9} {:>9} {:>7} {:>6} {:>6}  {}"
HEAD = ("item", "us", "peer us", "ratio", "%copy", "%peak", "")
BASE = ("float_linear", "float_conv2d")  # the float call that ours stands for
Row = dict[str, Any]


def _number(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"


def _key(row: Row) -> tuple[Any, ...]:
    """Returns the product or convolution that a row is about, whatever its weight is packed in."""
    shape = row["shape"]
    names = ("x", "n", "kernel_size", "stride")
    return (
        tuple(str(shape.get(name)) for name in names) if "n" in shape else ("", str(shape), row["op"], row["direction"])
    )


def timed_lines(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each timed item: ours beside the float call of the same sizes, and the other peers behind."""
    timed = [row for row in rows if row.get("kind") == "op"]
    floats = {_key(row): 1e3 * row["ms_p20"] for row in timed if row["provider"] in BASE and "ms_p20" in row}
    lines = []
    for item, members in _grouped(timed):
        ours = next((row for row in members if row["provider"] == "ours"), None)
        if ours is None or "ms_p20" not in ours:
            continue
        us, base = 1e3 * ours["ms_p20"], floats.get(_key(ours))
        others = [r for r in members if r["provider"] not in ("ours", *BASE)]
        notes = [f"{r['provider']} {1e3 * r['ms_p20']:.1f}" if "ms_p20" in r else f"{r['provider']} -" for r in others]
        notes += [] if ours.get("agrees", True) else [f"differs in {ours['mismatch']:.1e}"]
        notes += [] if ours.get("graph", True) else ["no graph"]
        beside = (f"{base:.1f}", f"{base / us:.2f}x") if base else ("-", "-")
        rates = (_number(ours, "percent_of_copy", "{:.0f}"), _number(ours, "percent_of_peak", "{:.0f}"))
        lines.append(LINE.format(item[:46], f"{us:.1f}", *beside, *rates, ", ".join(notes)).rstrip())
    return lines


def tile_lines(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each tuned problem: the best tile, and how much slower the default is that runs without it."""
    lines = []
    for item, members in _grouped(row for row in rows if row.get("kind") == "tile"):
        times = sorted((row["us"], i) for i, row in enumerate(members) if "us" in row)
        failed = sum("error" in row for row in members)
        if times:
            best = members[times[0][1]]["tile"]
            what = " ".join(f"{name}={value}" for name, value in best.items() if value is not False)
            lines.append(f"{item[:46]:46} {times[0][0]:9.1f}  of {len(members)} tiles ({failed} failed): {what}")
    return lines


def kernel_lines(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['item'][:46]:46} " + ", ".join(f"{name[:40]} {us:g}" for name, us in row["us"].items())
        for row in rows
        if row.get("kind") == "kernels"
    ]


def _grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["item"], []).append(row)
    return list(groups.items())


def table(head: Sequence[str], rows: Sequence[Row], accounts: Sequence[Account], where: str) -> str:
    """Returns the summary, at most `LENGTH` characters: what does not fit is counted, the least important left out."""
    lines = [*head, ""]
    lines += [account.line[:400] for account in accounts]
    for account in accounts:
        bad = [
            f"  {item.partition('/')[2]}: {why}"[:160]
            for item, (result, why) in account.ends.items()
            if result == "failed"
        ]
        lines += [f"failed in {account.step}:", *bad[:12]] if bad else []
        lines += [f"  and {len(bad) - 12} more"] if len(bad) > 12 else []
    rest = [*decode_lines(rows), LINE.format(*HEAD), *timed_lines(rows), *kernel_lines(rows), *tile_lines(rows)]
    room, kept = LENGTH - len("\n".join(lines)) - len(where) - 60, []
    for i, line in enumerate(rest):
        if len(line) + 1 > room:
            kept.append(f"... {len(rest) - i} more lines in rows.jsonl")
            break
        kept.append(line)
        room -= len(line) + 1
    return "\n".join([*lines, "", *kept, where])[:LENGTH]
