"""compute-sanitizer over every op at small shapes: a run of its own, slow and watchful."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.agree import outputs_of, step
from gs_kernels.runtime.opspec import specs

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / sub / "compute-sanitizer" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.is_file()), None)


def sanitize(tool: str) -> int:
    """Runs the tool; its exit code, or 2 where it is not installed."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("bench.gpu: --sanitize needs compute-sanitizer on PATH or in CUDA_HOME, got none", file=sys.stderr)
        return 2
    argv = [sanitizer, "--error-exitcode", "3", "--target-processes", "all", "--tool", tool]
    argv += [sys.executable, "-m", "bench.gpu", "--small-shapes"]
    # without the caching allocator every tensor is an allocation of its own, whose ends the sanitizer knows
    return subprocess.run(argv, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode


def run_small_shapes(device: str) -> int:
    """Calls every op at every test shape, forward and backward once, in the first type of its spec."""
    calls = 0
    for spec in specs():
        dtype = next(iter(spec.tol))
        for shape in spec.test_shapes:
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
