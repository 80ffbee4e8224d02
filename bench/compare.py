"""`python -m bench.compare BASE [HEAD]`: compares times of two commits or result files; exit code 1 on a regression.

A commit is checked out into a git worktree and measured there by its own `bench.run`; base and head take turns, so that
a machine that slows down does so for both. A row is a regression if the fastest fifth of its calls (p20) is slower by
more than `--tolerance` in every round, and faster if it is faster in every round; what lies between is noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parent.parent
COLUMNS = "{:22} {:44} {:9} {:4} {:>9} {:>9} {:>7}  {}"
Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """Compares one op at one shape: best times of each side in ms, and the ratio of the round that is nearest to 1."""

    key: Key
    base_ms: float
    head_ms: float
    ratio: float

    def verdict(self, tolerance: float) -> str:
        return "SLOWER" if self.ratio > 1 + tolerance else "faster" if self.ratio < 1 / (1 + tolerance) else ""


def read_times(path: Path) -> dict[Key, float]:
    """Reads (op, shape, dtype, direction) -> p20 in ms of this project's rows; a later row replaces an earlier one.

    Raises:
        ValueError: if the file holds no such row, or a line is not JSON.
    """
    times: dict[Key, float] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"bench.compare: {path}:{number} must be a JSON object, got {error}") from error
        if row.get("kind") == "op" and row.get("provider") == "ours" and "ms_p20" in row:
            shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
            times[row["op"], shape, row["dtype"], row["direction"]] = row["ms_p20"]
    if not times:
        raise ValueError(f"bench.compare: {path} must hold rows of bench.run with times, got none")
    return times


def changes(rounds: Sequence[tuple[dict[Key, float], dict[Key, float]]]) -> list[Change]:
    """Compares the rows that both sides have in every round; the ratio that claims least of the rounds' counts."""
    shared = set.intersection(*(set(base) & set(head) for base, head in rounds))
    rows = []
    for key in sorted(shared):
        ratios = [head[key] / base[key] for base, head in rounds]
        one_way = min(ratios) if min(ratios) > 1 else max(ratios) if max(ratios) < 1 else 1.0
        rows.append(Change(key, min(b[key] for b, _ in rounds), min(h[key] for _, h in rounds), one_way))
    return rows


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Makes a worktree of the commit, and removes it again."""
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        tree = Path(folder) / "tree"
        add = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, capture_output=True, text=True
        )
        if add.returncode:
            raise ValueError(f"bench.compare: {commit!r} must be a commit or a results file, got: {add.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)


def measure(tree: Path, out: Path, arguments: Sequence[str]) -> dict[Key, float]:
    """Runs `bench.run` of a source tree in a process of its own, and returns its times."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.run", "--ours-only", "--out", str(out), *arguments]
    run = subprocess.run(command, cwd=tree, check=False)
    if not out.exists():
        raise ValueError(f"bench.compare: bench.run must write rows, got exit code {run.returncode} in {tree}")
    return read_times(out)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__.partition("\n")[0], epilog="Other options go to bench.run."
    )
    parser.add_argument("base", help="a commit, or a .jsonl of bench.run")
    parser.add_argument("head", nargs="?", help="likewise; default: the working tree")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is measured; default 3")
    parser.add_argument("--tolerance", type=float, default=0.05, help="slower by more than this share; default 0.05")
    chosen, arguments = parser.parse_known_args(argv)
    if chosen.rounds < 1 or not 0 <= chosen.tolerance < 1:
        parser.error(f"--rounds must be >= 1 and --tolerance in [0, 1), got {chosen.rounds}, {chosen.tolerance}")
    return chosen, arguments


def collect(chosen: argparse.Namespace, arguments: Sequence[str]) -> list[tuple[dict[Key, float], dict[Key, float]]]:
    """Measures one (base, head) pair of times per round; files are read once."""
    files = [Path(side) for side in (chosen.base, chosen.head) if side and side.endswith(".jsonl")]
    if len(files) == 2:
        return [(read_times(files[0]), read_times(files[1]))]
    if files:
        raise ValueError("bench.compare: base and head must both be files or both be commits, got one of each")
    with ExitStack() as stack:
        base = stack.enter_context(checkout(chosen.base))
        head = ROOT if chosen.head is None else stack.enter_context(checkout(chosen.head))
        out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "rows.jsonl"
        return [(measure(base, out, arguments), measure(head, out, arguments)) for _ in range(chosen.rounds)]


def main(argv: list[str] | None = None) -> int:
    chosen, arguments = parse(argv)
    try:
        rows = changes(collect(chosen, arguments))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(COLUMNS.format("op", "shape", "dtype", "pass", "base ms", "head ms", "ratio", ""))
    slower = 0
    for change in rows:
        verdict = change.verdict(chosen.tolerance)
        slower += verdict == "SLOWER"
        op, shape, dtype, direction = change.key
        times = (f"{change.base_ms:.4f}", f"{change.head_ms:.4f}", f"{change.ratio:.2f}x")
        print(COLUMNS.format(op, shape[:44], dtype, direction, *times, verdict))
    print(f"{len(rows)} rows, {slower} slower by more than {chosen.tolerance:.0%}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
