"""`python -m bench.gpu [--seconds N] [--out FOLDER] [--cache FILE] [--shortlist FILE]`, on a machine with a GPU.

    python -m bench.gpu --precompile FOLDER --target sm_90     # without one: FOLDER/cache.tar.gz
    python -m bench.gpu --seconds 400 --cache FOLDER/cache.tar.gz --out results

Exit code 0: nothing failed, 1: an item failed, 2: no GPU, 130: interrupted. What was measured is kept in each case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from bench import record
from bench.gpu.driver import Driver, Options
from bench.gpu.plan import SECONDS, steps
from bench.gpu.precompile import ARCHIVE, precompile
from bench.gpu.sanitize import TOOLS, run_small_shapes, sanitize
from gs_kernels.aot.targets import TARGETS
from gs_kernels.runtime.dispatch import INTERPRET


def parse(argv: list[str] | None) -> argparse.Namespace:
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Measures all there is to measure on a GPU."
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything; default: {SECONDS:g}")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of rows.jsonl, log.txt, table.txt and tables of tiles"
    )
    parser.add_argument("--cache", type=Path, metavar="FILE", help=f"{ARCHIVE} of --precompile")
    parser.add_argument(
        "--shortlist", type=Path, metavar="FILE", help="tiles that `golden-stick tune --shortlist` ranked"
    )
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--dry-run", action="store_true", help="walk the plan on a CPU, with times that are made up")
    parser.add_argument("--precompile", type=Path, metavar="FOLDER", help=f"compile all kernels of the plan: {ARCHIVE}")
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90", help="of --precompile; default: sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of --precompile")
    parser.add_argument("--sanitize", choices=TOOLS, help="run a tool of compute-sanitizer over small shapes instead")
    parser.add_argument("--small-shapes", action="store_true", help="only call every op at its test shapes")
    chosen = parser.parse_args(argv)
    if INTERPRET:
        parser.error("times and machine code need kernels that compile, got TRITON_INTERPRET=1; unset it")
    if not chosen.seconds > 0:
        parser.error(f"--seconds must be > 0, got {chosen.seconds:g}")
    for name, path in (("--cache", chosen.cache), ("--shortlist", chosen.shortlist)):
        if path is not None and not path.is_file():
            parser.error(f"{name} must be a file, got {path}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = parse(argv)
    plan = [step for step in steps() if chosen.only is None or step.name in (*chosen.only, "ceilings")]
    if chosen.precompile is not None:
        return precompile(chosen.precompile, chosen.target, chosen.jobs, chosen.shortlist, plan)
    if not chosen.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu: needs an NVIDIA GPU, and torch sees none; --dry-run walks the plan without one", file=sys.stderr
        )
        return 2
    if chosen.small_shapes:
        return run_small_shapes("cuda")
    if chosen.sanitize is not None:
        return sanitize(chosen.sanitize)
    out = chosen.out
    if out is None:
        usual = record.default_path("cuda").with_suffix("") if not chosen.dry_run else None
        out = usual or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    target = chosen.target
    if not chosen.dry_run:
        major, minor = torch.cuda.get_device_capability()
        target = f"sm_{10 * major + minor}"
    options = Options(chosen.seconds, out, chosen.dry_run, chosen.cache, chosen.shortlist, target)
    return Driver(plan, options).run()


if __name__ == "__main__":
    sys.exit(main())
