"""Lets Triton build its launchers where there is no GPU: C modules, one a signature, linked with CUDA's driver.

A library of that name is made which has all functions that Triton's own sources name, and does nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

NAME = "libcuda.so.1"


def build_stub(folder: Path) -> Path:
    """Compiles the library into a folder, and returns its path.

    Raises:
        RuntimeError: if there is no C compiler, or it fails.
    """
    import triton.backends.nvidia.driver as driver

    home = Path(driver.__file__).parent
    text = "".join((home / name).read_text() for name in ("driver.c", "driver.py") if (home / name).exists())
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", text)))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    compiler = os.environ.get("CC", "gcc")
    argv = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-o", str(folder / NAME), str(source)]
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(f"bench.gpu: {compiler} must compile a stub of {NAME}, got {said.strip()[:200]}") from error
    return folder / NAME


def take_stub(library: Path) -> None:
    """Makes the library the CUDA driver of this process, for Triton alone: launchers are built, and cannot launch."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    use_driver()


def use_driver() -> None:
    """Has Triton take NVIDIA's driver, whatever torch sees."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    driver.set_active(CudaDriver())
