"""Starts the command `golden-stick`, or says in one line that its packages (typer, rich) are not installed."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich")


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"golden-stick: needs the packages {' and '.join(NEEDED)}, got no {' and no '.join(missing)}; "
            "pip install 'golden-stick-triton[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from gs_algos.cli.app import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
