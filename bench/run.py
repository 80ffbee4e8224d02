"""`python -m bench.run`: times every op against its reference, `torch.compile` of it, and library functions.

Nothing is timed before its outputs and gradients agree with the reference within the tolerance of the spec. A provider
that differs in at most one element of a thousand (another rounding of ties) is timed and marked; one that differs more
is not. Times are of warm calls; percentages are of the copy bandwidth and of the peak of torch's products (int8 for ops
of int8, fp8 for those of fp8 on a GPU that has it, else bf16), both measured first: on a CPU, a tensor that fits the
cache can exceed 100 %. A provider that moves other bytes than the op has those in its row, or none if nobody knows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.agree import agreement, outputs_of, step
from bench.peers import absent, own_bytes, peers
from bench.roofline import copy_bandwidth, peak_of, product_peaks
from bench.shapes import bench_shapes
from bench.tables.cells import shape_text
from bench.timing import time_calls
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import Case, OpSpec, Shape, map_tensors, specs
from gs_kernels.tuning.graph_timing import copies_beyond_cache

QUICK_S = 150.0  # after which --quick starts nothing new: with the last it takes less than three minutes
COLUMNS = "{:19} {:42} {:8} {:19} {:4} {:>9} {:>9} {:>9} {:>7} {:>6} {:>8}  {}"
HEAD = ("op", "shape", "dtype", "provider", "pass", "p20 ms", "p50 ms", "p80 ms", "GB/s", "%copy", "vs ours", "")


@dataclass(frozen=True)
class Job:
    """Describes one thing to time: an op at a shape, forward ("fwd") or forward and backward ("f+b")."""

    spec: OpSpec
    group: str
    shape: Shape
    dtype: torch.dtype
    direction: str

    def cost(self) -> tuple[int, int]:
        """Bytes and operations of the timed passes; 0 bytes if the spec does not know those of the backward pass."""
        forward = self.spec.cost(self.shape, self.dtype)
        if self.direction == "fwd":
            return forward.nbytes, forward.flops
        if self.spec.backward_cost is None:
            return 0, 0
        backward = self.spec.backward_cost(self.shape, self.dtype)
        return forward.nbytes + backward.nbytes, forward.flops + backward.flops

    def make(self, device: str, copies: int) -> list[Case]:
        """Makes the same inputs in `copies` places of memory."""
        generator = torch.Generator(device=device).manual_seed(0)
        first = self.spec.make(self.shape, self.dtype, torch.device(device), generator)
        learning = first.grad_args if self.direction == "f+b" else ()

        def copy(case: Case) -> Case:
            args = [map_tensors(lambda t: t.detach().clone(), a) for a in case.args]
            return replace(case, args=tuple(a.requires_grad_() if i in learning else a for i, a in enumerate(args)))

        return [copy(first) for _ in range(copies)]


def providers(
    spec: OpSpec, ours_only: bool = False, without: Sequence[str] = ()
) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "ours", spec.run
    if ours_only:
        return
    if "torch" not in without:
        yield "torch", spec.ref
    if "compile" not in without:
        torch.compiler.reset()
        yield "compile", torch.compile(spec.ref, dynamic=False)
    yield from ((name, run) for name, run in peers(spec.name).items() if name not in without)


def measure(
    job: Job,
    device: str,
    bandwidth: float,
    peaks: dict[str, float],
    seconds: float,
    ours_only: bool = False,
    without: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Times the job; returns one row per provider: a provider that fails or disagrees has no times."""
    nbytes, flops = job.cost()
    cases = job.make(device, copies_beyond_cache(job.spec.cost(job.shape, job.dtype).nbytes, device))
    generator = torch.Generator(device=device).manual_seed(1)
    dys = [
        torch.randn(y.shape, dtype=y.dtype, device=device, generator=generator)
        for y in outputs_of(job.spec.ref(*cases[0].args, **cases[0].kwargs))
        if job.direction == "f+b" and y.is_floating_point()
    ]
    want = step(job.spec.ref, cases[0], dys)
    tol, grad_tol = job.spec.tol[job.dtype], job.spec.grad_tol.get(job.dtype, 1e-5)
    common = {
        "op": job.spec.name,
        "group": job.group,
        "shape": job.shape,
        "dtype": str(job.dtype).removeprefix("torch."),
        "direction": job.direction,
        "copy_gbps": round(bandwidth, 1),
    }
    for name, run in providers(job.spec, ours_only, without):
        row = {**common, "provider": name}
        try:
            agrees = agreement(run, cases[0], dys, want, tol, grad_tol)
            row |= {"agrees": agrees.full, "mismatch": agrees.mismatch, "grad_error": agrees.grad_error}
            if agrees.nearly:
                timing = time_calls([partial(step, run, case, dys) for case in cases], device, seconds)
                row |= {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(timing).items()}
                tflops, peak = flops / timing.ms_p50 / 1e9, peak_of(job.spec.name, peaks)
                row |= {"copies": len(cases), "tflops": round(tflops, 3)}
                row |= {"peak_tflops": round(peak, 2), "percent_of_peak": round(100 * tflops / peak, 1)}
                moved = own_bytes(job.spec.name, name, cases[0], nbytes)
                if moved:
                    gbps = moved / timing.ms_p50 / 1e6
                    row |= {
                        "nbytes": moved,
                        "gbps": float(f"{gbps:.4g}"),
                        "percent_of_copy": round(100 * gbps / bandwidth, 1),
                    }
        except Exception as error:  # noqa: BLE001  Triton's and a library's own errors are of any type: each is a row
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield row


def note(row: dict[str, Any]) -> str:
    """Tells what a reader must know of a row beside its numbers."""
    if "error" in row:
        return f"failed: {row['error']}"
    differs = f"differs in {row['mismatch']:.3%} of elements, gradients by {row['grad_error']:.1e}"
    return "" if row["agrees"] else differs if "ms_p50" in row else f"NOT TIMED: {differs}"


def line(row: dict[str, Any], ours: float | None) -> str:
    call = (row["op"], shape_text(row["shape"])[:42], row["dtype"], row["provider"], row["direction"])
    if "ms_p50" not in row:
        return COLUMNS.format(*call, *["-"] * 6, note(row))
    times = tuple(f"{row[k]:.4f}" for k in ("ms_p20", "ms_p50", "ms_p80"))
    rates = (f"{row['gbps']:.1f}", f"{row['percent_of_copy']:.0f}") if "gbps" in row else ("-", "-")
    ratio = f"{row['ms_p50'] / ours:.2f}x" if ours and row["agrees"] else "-"
    return COLUMNS.format(*call, *times, *rates, ratio, note(row))


def jobs(chosen: argparse.Namespace) -> Iterator[Job]:
    for spec in specs():
        if chosen.op not in (None, spec.name):
            continue
        groups = {g: s for g, s in bench_shapes(spec).items() if chosen.shapes in (None, g)}
        shapes = [(group, shape) for group, shapes in groups.items() for shape in shapes]
        if chosen.quick and shapes:
            dtype = spec_dtypes(spec, chosen.dtype)[0]
            shapes = [min(shapes, key=lambda s: spec.cost(s[1], dtype).nbytes)]
        for group, shape in shapes:
            for dtype in spec_dtypes(spec, chosen.dtype)[: 1 if chosen.quick else None]:
                for direction in ("fwd", "f+b") if spec.backward else ("fwd",):
                    yield Job(spec, group, shape, dtype, direction)


def spec_dtypes(spec: OpSpec, wanted: list[str]) -> list[torch.dtype]:
    return [d for d in (getattr(torch, name) for name in wanted) if d in spec.tol] or list(spec.tol)[:1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.partition("\n")[0])
    every = specs()
    groups = sorted({group for spec in every for group in bench_shapes(spec)})
    parser.add_argument("--op", choices=[spec.name for spec in every], help="only this op")
    parser.add_argument("--shapes", choices=groups, metavar="GROUP", help=f"only these shapes: {', '.join(groups)}")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="default: by device")
    parser.add_argument("--quick", action="store_true", help="the smallest shape of each op, one dtype")
    parser.add_argument("--ours-only", action="store_true", help="time no other provider, as bench.compare does")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PROVIDER", help="e.g. compile: takes seconds a shape"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="time for one number; default 1, with --quick 0.3")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="start nothing new after so many seconds; with --quick 150"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    chosen = parser.parse_args(argv)
    if INTERPRET:
        parser.error("times under TRITON_INTERPRET=1 mean nothing; unset it")
    others = {"torch", "compile"}.union(*({*peers(spec.name), *absent(spec.name)} for spec in every))
    if unknown := set(chosen.without) - others:
        parser.error(f"--without must name {', '.join(sorted(others))}, got {', '.join(sorted(unknown))}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch sees none; use --device cpu")
    chosen.dtype = chosen.dtype or (["bfloat16", "float32"] if chosen.device == "cuda" else ["float32"])
    chosen.seconds = chosen.seconds or (0.3 if chosen.quick else 1.0)
    chosen.limit = QUICK_S if chosen.quick and chosen.limit is None else chosen.limit
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = parse(argv)
    start = time.monotonic()
    path = chosen.out or record.default_path(chosen.device)
    bandwidth = copy_bandwidth(chosen.device, chosen.seconds)
    peaks = product_peaks(chosen.device, chosen.seconds)
    ceilings = {"copy_gbps": round(bandwidth, 1), **{f"{name}_tflops": round(v, 2) for name, v in peaks.items()}}
    record.append(ceilings, "roofline", device=chosen.device, path=path)
    print(
        f"{record.device_name(chosen.device)}, {torch.get_num_threads()} threads, copy {bandwidth:.1f} GB/s, products "
        f"{peaks['bfloat16']:.3g} TFLOP/s in bf16, {peaks['int8']:.3g} TOP/s in int8 -> {path}"
    )
    for spec in specs() if not chosen.ours_only else ():
        for name, why in absent(spec.name).items() if chosen.op in (None, spec.name) else ():
            print(f"{spec.name}: {name} is not timed: it {why}")
            record.append({"op": spec.name, "provider": name, "why": why}, "absent", device=chosen.device, path=path)
    print(COLUMNS.format(*HEAD))
    failed = False
    for job in jobs(chosen):
        if chosen.limit is not None and time.monotonic() - start > chosen.limit:
            print(f"--limit {chosen.limit:g} s reached before {job.spec.name} {job.shape} {job.direction}; not timed")
            failed = True
            break
        ours = None
        for row in measure(job, chosen.device, bandwidth, peaks, chosen.seconds, chosen.ours_only, chosen.without):
            record.append(row, "op", device=chosen.device, path=path)
            ours = row.get("ms_p50") if row["provider"] == "ours" else ours
            failed |= row["provider"] == "ours" and "ms_p50" not in row
            print(line(row, ours), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
