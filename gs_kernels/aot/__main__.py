"""`python -m gs_kernels.aot [--op NAME] [--target sm_90] [--jobs 1]`: table of every kernel; 1 if a bound is broken.

With --sweep instead: every integer argument of every kernel of the ops' test cases as the constant 1 and with 64 bits.
With --shared instead: shared memory of the launches that tile rules choose, all or a sample, on NVIDIA targets.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from gs_kernels.aot import TARGETS, Report
from gs_kernels.aot.jobs import compilers
from gs_kernels.aot.shared import SAMPLED, check_shared
from gs_kernels.aot.shared import TARGETS as SHARED_TARGETS
from gs_kernels.aot.sweep import spec_kernels, sweep
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import OpSpec, specs

COLUMNS = "{:34} {:7} {:34} {:>4} {:>5} {:>7} {:>15} {:>15} {:>8} {:>5} {:>5} {:>7} {:>14}  {}"
MEASURES = ("regs", "spill", "shared", "loads", "stores", "mma", "ins", "loop", "ins/el", "occupancy")


def _widths(accesses: Counter[int]) -> str:
    return " ".join(f"{n}x{nbytes}B" for nbytes, n in sorted(accesses.items(), reverse=True)) or "-"


def row(case: str, r: Report, verdict: str) -> str:
    cost = (r.registers, r.spills, r.shared_bytes, _widths(r.loads), _widths(r.stores), (r.mma or "-")[:8])
    size = (r.instructions, r.loop_instructions or "-", f"{r.per_element:.2f}")
    held = f"{r.occupancy.warps}w {r.occupancy.limiter}"
    return COLUMNS.format(case, r.target, r.kernel[:34], *cost, *size, held, verdict)


def _gate(known: list[OpSpec], target: str | None, jobs: int) -> int:
    print(COLUMNS.format("case", "target", "kernel", *MEASURES, "verdict"))
    work = [
        (spec, i, name)
        for spec in known
        for i, case in enumerate(spec.aot)
        for name in (case.targets if target is None else {target} & set(case.targets))
    ]
    failures = 0
    with compilers(jobs) as compiled:
        for (spec, i, _), checked in zip(work, compiled(work), strict=True):
            failures += sum(bool(wrong) for _, wrong in checked)
            for kernel, wrong in checked:
                print(row(f"{spec.name}/{spec.aot[i].name}", kernel, "FAIL: " + "; ".join(wrong) if wrong else "PASS"))
    print(
        f"\nloads, stores: accesses of one thread, in the hot loop if there is one. {failures} kernels out of bounds."
    )
    return int(failures > 0)


def _sweep(known: list[OpSpec], target: str) -> int:
    kernels = spec_kernels(known, target)
    failures = sweep(kernels)
    print("\n".join([*failures, f"{len(kernels)} kernels swept for {target}, {len(failures)} failures."]))
    return int(bool(failures))


def _shared(known: list[OpSpec], targets: Sequence[str], every: bool) -> int:
    failures = 0
    for target in targets:
        found = list(check_shared(known, target, every))
        failures += sum(bool(wrong) for *_, wrong in found)
        lines = [f"{target} {name} {kernel}: FAIL: {wrong}" for name, kernel, _, wrong in found if wrong]
        most = max((nbytes for _, _, nbytes, _ in found), default=0)
        print("\n".join([*lines, f"{len(found)} kernels for {target} take at most {most} bytes of shared memory."]))
    print(f"{failures} kernels do not fit.")
    return int(failures > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gs_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = specs()
    parser.add_argument("--op", choices=[spec.name for spec in known], help="only this op")
    parser.add_argument("--target", choices=list(TARGETS), help="only this target")
    parser.add_argument("--sweep", action="store_true", help="compile with integer arguments 1, and of 64 bits")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile the kernels of the table")
    parser.add_argument("--shared", choices=["sample", "all"], help="check shared memory of what tile rules choose")
    chosen = parser.parse_args(argv)
    if INTERPRET:
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    if chosen.jobs < 1 or (chosen.jobs > 1 and (chosen.sweep or chosen.shared)):
        parser.error(f"--jobs must be >= 1, and 1 with --sweep or --shared, got {chosen.jobs}")
    wanted = [spec for spec in known if chosen.op in (None, spec.name)]
    if chosen.sweep:
        return _sweep(wanted, chosen.target or "sm_90")
    if chosen.shared:
        targets = SAMPLED if chosen.shared == "sample" else SHARED_TARGETS
        return _shared(wanted, targets if chosen.target is None else [chosen.target], chosen.shared == "all")
    return _gate(wanted, chosen.target, chosen.jobs)


if __name__ == "__main__":
    sys.exit(main())
