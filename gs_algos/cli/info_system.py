"""Runs `golden-stick info --system`: says what golden-stick runs on, for a report of a problem or of a speed."""

from __future__ import annotations

import platform

import torch

from gs_algos.core.machine import PACKAGE, device_name, package_version
from gs_kernels.cpu.compile import instruction_sets
from gs_kernels.cpu.library import library, path_of, problems
from gs_kernels.runtime.instructions import described, instruction_set


def describe_system() -> str:
    """Names versions, the CPU with the instructions that kernels use, the library of CPU kernels, and GPUs."""
    versions = {"golden-stick": package_version(PACKAGE), "PyTorch": torch.__version__}
    versions |= {"Triton": package_version("triton"), "Python": platform.python_version()}
    chosen = instruction_set()
    loaded = library()
    lines = [
        ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        f"CPU: {device_name('cpu')}, {platform.machine()}, {torch.get_num_threads()} threads",
        f"instructions: {described()}; of {', '.join(instruction_sets())} the kernels take {chosen}",
        f"CPU kernels: {'loaded from' if loaded is not None else 'not loaded:'} {path_of(chosen)}",
        *(f"  {problem}" for problem in problems()),
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "\n".join([*lines, f"GPUs: {', '.join(gpus) or 'none'}"])
