"""`python -m bench.gpu`: everything to run on a machine with an NVIDIA GPU, in order, in less than nine minutes.

1. conformance: every op on the GPU, in every dtype of its spec, bf16 and fp16 among them.
2. compute-sanitizer memcheck and racecheck over every op at its test shapes, where the tool is installed.
3. the benchmarks of ops, the most important first, with all peers, then of whole networks.
4. the tuner, which writes its table after each problem.

Every phase has a time limit and writes what it finds as it goes (`bench/results/<device>/`, a .jsonl and a .log file).
`--out FOLDER` writes all of it there, tables too: what a machine that is taken away gives back.
Exit code 0: all passed, 1: a phase failed, 2: no GPU, 130: interrupted. `--device cpu` tries the script without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.agree import outputs_of, step
from gs_kernels.runtime.opspec import specs
from gs_kernels.tuning.tables import SHIPPED

ROOT = Path(__file__).parent.parent
KILLED = -int(signal.SIGKILL)
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Phase:
    """A command and the seconds after which it is stopped. skip: why it cannot run here."""

    name: str
    argv: tuple[str, ...]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / sub / "compute-sanitizer" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.is_file()), None)


def phases(device: str, path: Path, tables: Path) -> list[Phase]:
    """What to run, the most important first, with limits that add up to less than nine minutes.

    Args:
        path: of the rows.
        tables: folder of the tuner's tables.
    """
    sanitizer = find_sanitizer()
    why = "" if sanitizer else "no compute-sanitizer on PATH or in CUDA_HOME"
    why = why if device == "cuda" else "compute-sanitizer needs a GPU"
    # without the caching allocator every tensor is an allocation of its own, whose ends the sanitizer knows
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = (sys.executable, "-m", "bench.gpu", "--small-shapes", "--device", device)
    check = (sanitizer or "", "--error-exitcode", "3", "--target-processes", "all", "--tool")
    models = (sys.executable, "-m", "bench.models", "--device", device, "--limit", "40", "--out", str(path))
    some = ("--network", "resnet18", "llama-block", "--algorithm", "float", "simqat-w4a8", "slb-w2")
    tiny = ("--quick", "--network", "resnet18", "--algorithm", "float", "--seconds", "0.1")
    tests = ("tests/kernels/test_conformance.py", "-q", "-rs")
    return [
        Phase("conformance", (sys.executable, "-m", "pytest", *tests), 110),
        Phase("small-shapes", small, 30),
        Phase("memcheck", (*check, "memcheck", *small), 40, alone, why),
        Phase("racecheck", (*check, "racecheck", *small), 40, alone, why),
        *(_timing(name, device, path, *about) for name, about in BENCHMARKS.items()),
        Phase("models", (*models, *(some if device == "cuda" else tiny)), 45),
        _tuning(device, tables),
    ]


# seconds, and which calls. Compiling the reference takes seconds a shape: where it is no peer, it is left out
BENCHMARKS: dict[str, tuple[float, tuple[str, ...]]] = {
    "products-w4": (50, ("--op", "qmatmul", "--shapes", "w4", "--without", "torch", "compile")),
    "convolutions-w4": (30, ("--op", "qconv2d", "--shapes", "resnet50_w4", "--without", "torch", "compile")),
    "fake-quant": (25, ("--op", "fake_quant", "--shapes", "64M")),
    "slb": (25, ("--op", "slb_weight", "--shapes", "4096x4096")),
    "products-w2": (25, ("--op", "qmatmul", "--shapes", "w2", "--without", "torch", "compile")),
    "products-w1": (20, ("--op", "qmatmul", "--shapes", "w1", "--without", "torch", "compile")),
    "products-w4a8": (25, ("--op", "qmatmul_fp8", "--shapes", "w4a8", "--without", "torch", "compile")),
}


def _timing(name: str, device: str, path: Path, seconds: float, about: tuple[str, ...]) -> Phase:
    """Rows are written as they are measured: a phase that is stopped leaves what it has."""
    argv = (sys.executable, "-m", "bench.run", "--device", device, "--seconds", "0.1", "--out", str(path))
    if device == "cuda":
        return Phase(name, (*argv, "--dtype", "bfloat16", "--limit", str(seconds - 5), *about), seconds)
    return Phase(name, (*argv, "--quick", *about[:2], "--without", "torch", "compile"), seconds)


def _tuning(device: str, tables: Path) -> Phase:
    sizes = ("--layer", "4096x4096", "--layer", "14336x4096", *(f"--rows={m}" for m in (1, 16, 64, 256)), "--keep", "6")
    tune = (sys.executable, "-m", "gs_algos.cli.main", "tune", *sizes, "--out", str(tables))
    return Phase("tuning", tune, 70, skip="" if device == "cuda" else "the tuner times kernels on a GPU")


def run_phase(phase: Phase, log: Path) -> dict[str, Any]:
    """Runs the command in its own process group, copies its output to screen and log, and stops it at its limit.

    Interrupted or told to end, it stops the command and gives a row that says so.
    """
    row: dict[str, Any] = {"phase": phase.name, "limit_s": phase.seconds}
    if phase.skip:
        return {**row, "result": "skipped", "why": phase.skip}
    start = time.monotonic()
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, **phase.env}
    process = subprocess.Popen(phase.argv, cwd=ROOT, env=env, start_new_session=True, **pipe)
    signals: list[int] = []

    def stop(number: int = 0, frame: object = None) -> None:
        signals.append(number)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(phase.seconds, stop)
    timer.start()
    # not an exception, which could strike between a line that is read and its way to the log
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    last = ""
    try:
        with log.open("a") as file:
            file.write(f"\n== {phase.name}: {' '.join(phase.argv)}\n")
            for output in process.stdout or ():
                print(output, end="", flush=True)
                file.write(output)
                file.flush()
                last = output.strip() or last
        code = process.wait()
    finally:
        timer.cancel()
        stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    interrupted = any(signals)
    seconds = time.monotonic() - start
    late = (code == KILLED and seconds >= phase.seconds) or last.startswith("--limit")
    result = "passed" if code == 0 else "stopped at its limit" if late else "failed"
    result = INTERRUPTED if interrupted else result
    return {**row, "result": result, "exit_code": code, "seconds": round(seconds, 1), "last_line": last[:300]}


def run_small_shapes(device: str) -> int:
    """Every op at every test shape and dtype, forward and backward once: small work for a slow, watchful tool."""
    calls = 0
    for spec in specs():
        for shape in spec.test_shapes:
            for dtype in spec.tol:
                generator = torch.Generator(device=device).manual_seed(0)
                case = spec.make(shape, dtype, torch.device(device), generator)
                for i in case.grad_args:
                    case.args[i].requires_grad_()
                dys = [torch.ones_like(y) for y in outputs_of(spec.run(*case.args, **case.kwargs))]
                step(spec.run, case, dys)
                calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls at small shapes, forward and backward")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: try the script without a GPU")
    parser.add_argument("--small-shapes", action="store_true", help="only call every op at its test shapes")
    known = [phase.name for phase in phases("cpu", Path(), Path())]
    parser.add_argument("--only", nargs="+", metavar="PHASE", choices=known, help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of rows, log and tables of tiles")
    chosen = parser.parse_args(argv)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: needs an NVIDIA GPU, and torch sees none; --device cpu tries the script", file=sys.stderr)
        return 2
    if chosen.small_shapes:
        return run_small_shapes(chosen.device)
    path = record.default_path(chosen.device)
    path = path if chosen.out is None else chosen.out.absolute() / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for phase in phases(chosen.device, path, SHIPPED if chosen.out is None else path.parent):
        if (chosen.only is None or phase.name in chosen.only) and not _interrupted(rows):
            print(f"\n== {phase.name} (at most {phase.seconds:g} s)", flush=True)
            rows.append(run_phase(phase, path.with_suffix(".log")))
            record.append(rows[-1], "gpu", device=chosen.device, path=path)
    print(f"\n{record.device_name(chosen.device)} -> {path}")
    for row in rows:
        print("{phase:16} {result:22}".format(**row), row.get("why") or f"{row['seconds']} s  {row['last_line']}")
    return 130 if _interrupted(rows) else int(any(row["result"] not in ("passed", "skipped") for row in rows))


def _interrupted(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and rows[-1]["result"] == INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
