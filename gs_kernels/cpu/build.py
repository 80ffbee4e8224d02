"""Builds the C++ kernels of a checkout: `python -m gs_kernels.cpu.build`; an installation has done it."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from gs_kernels.cpu.compile import FOLDER, BuildError, build, file_name, instruction_sets


def main(argv: Sequence[str] | None = None) -> int:
    known = ", ".join(instruction_sets())
    parser = argparse.ArgumentParser(prog="python -m gs_kernels.cpu.build", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="SET", help=f"sets of instructions, of {known}; default: all")
    parser.add_argument("--flags", default="", help="more for the compiler, e.g. '-fsanitize=undefined'")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; default: that of the package")
    chosen = parser.parse_args(argv)
    unknown = [name for name in chosen.only or () if name not in instruction_sets()]
    if unknown:
        parser.error(f"--only must be of {known}, got {', '.join(unknown)}")
    try:
        for name in chosen.only or instruction_sets():
            path = build(name, chosen.out / file_name(name), shlex.split(chosen.flags))
            print(f"built {path} for {platform.machine()}, {name}", flush=True)
    except BuildError as error:
        print(f"gs_kernels.cpu.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
