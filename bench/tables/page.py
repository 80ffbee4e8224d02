"""`python -m bench.tables [--check]`: fills the tables of docs/benchmarks.md from the rows in `bench/results`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `--check` writes nothing and fails if one differs from
what the rows say, which is what the tests do. Of rows that measured the same thing the last one counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import record
from bench.tables import analyses, language, networks, times
from bench.tables.cells import Rows

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[Rows], str]] = {
    "accuracy": networks.accuracy,
    "pruned": networks.pruned,
    "language": language.language,
    "ptq": language.ptq,
    "reports": analyses.reports,
    "sensitivity": analyses.sensitivity,
    "search": networks.search,
    "analysis": analyses.analysis,
    "ptq-peers": language.ptq_peers,
    "synthesis": networks.synthesis,
    "distilled": language.distilled,
    "products": times.products,
    "ops": times.ops,
    "models": times.models,
    "decode": language.decode,
    "photographs": networks.photographs,
    "features": networks.features,
    "serving": language.serving,
    "convolutions": times.convolutions,
    "adder": times.adder,
    "adder-planes": times.adder_planes,
}


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of every measured file; static figures are no rows of this kind."""
    files = [path for path in sorted(folder.glob("*/*.jsonl")) if path.parent.name != "static"]
    return [row for path in files for row in record.read_rows(path)]


def fill(text: str, rows: Rows) -> str:
    """Returns the text with its tables made anew.

    Raises:
        ValueError: if a table is not known, or has no rows.
    """

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"bench.tables: table must be one of {', '.join(TABLES)}, got {name!r}")
        filled = TABLES[name](rows)
        if filled.count("\n") < 2:
            raise ValueError(f"bench.tables: {name} needs rows in bench/results, got none")
        return f"{match[1]}{filled}\n{match[3]}"

    return _PLACE.sub(made, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a table is not what rows say"
    )
    parser.add_argument("--file", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    parser.add_argument("--rows", type=Path, default=record.RESULTS, help="default: bench/results")
    chosen = parser.parse_args(argv)
    try:
        before = chosen.file.read_text()
        after = fill(before, all_rows(chosen.rows))
    except (OSError, ValueError) as error:
        print(error if isinstance(error, ValueError) else f"bench.tables: --file: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        if after != before:
            print(f"bench.tables: {chosen.file} must hold the tables of the rows; run `python -m bench.tables`")
        return int(after != before)
    chosen.file.write_text(after)
    return 0
