"""Names the machine that a measured time depends on: its processor, the instructions in use, versions, threads."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gs_kernels.runtime.instructions import described

PACKAGE = "golden-stick-triton"


def device_name(device: str | torch.device) -> str:
    """Names the GPU as its driver calls it, or the CPU as the operating system does."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str | torch.device) -> dict[str, Any]:
    """Returns device, versions and threads as plain values: what a time depends on beside the code."""
    kind = torch.device(device).type
    return {
        "device": kind,
        "device_name": device_name(device),
        "instructions": described() if kind == "cpu" else None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
