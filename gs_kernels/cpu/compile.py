"""Compiles the C++ of all kernels, one library for each set of vector instructions.

The installation of the package does so (setup.py), without PyTorch, so this file imports nothing else. Which of the
libraries a process loads is decided when it runs: what was built on one CPU runs on any other of its architecture.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PACKAGE = FOLDER.parent
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"))
# by architecture, from the instructions that every CPU has to the newest
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "generic": ("-O1",),  # half the compiler's time, for CPUs of before 2013
        "avx2": AVX2,
        "avx_vnni": (*AVX2, "-mavxvnni"),
        "avx512": AVX512,
        "avx512_vnni": (*AVX512, "-mavx512vnni"),
    },
    "aarch64": {"generic": (), "dotprod": ("-march=armv8.2-a+dotprod",)},
}
COMPILERS = ("g++", "c++", "clang++")


class BuildError(RuntimeError):
    """Says why nothing was compiled, in one line."""


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Returns the compiler's flags for each set of instructions of this architecture, the newest last."""
    return INSTRUCTION_SETS.get(platform.machine(), {"generic": ()})


def file_name(instruction_set: str) -> str:
    return f"kernels_{instruction_set}.so"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.cpp"))


def source_hash() -> str:
    """Returns what tells these sources from others: a library holds that of the ones it was built from."""
    digest = hashlib.sha256()
    for path in sorted([*sources(), *PACKAGE.rglob("*.h")]):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def flags_of(instruction_set: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns all flags that decide what is compiled, and those that have a library say from what it was."""
    flags = (*FLAGS, *instruction_sets()[instruction_set], *more)
    flags_hash = hashlib.sha256("\0".join(flags).encode()).hexdigest()[:16]
    return (*flags, f'-DGS_SOURCE_HASH="{source_hash()}"', f'-DGS_FLAGS_HASH="{flags_hash}"')


def is_current(library: Path, instruction_set: str) -> bool:
    """Says whether a library is there and was built from these sources with these flags, and no more."""
    said = [flag.partition('"')[2][:-1].encode() for flag in flags_of(instruction_set)[-2:]]
    return library.is_file() and all(text in library.read_bytes() for text in said)


def build(instruction_set: str, target: Path, more: Sequence[str] = ()) -> Path:
    """Compiles all sources for one set of instructions into a library, written whole or not at all.

    Raises:
        BuildError: if there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = _compiler()
    flags = (*flags_of(instruction_set, more), f"-I{FOLDER}")
    try:
        with tempfile.TemporaryDirectory(prefix="golden_stick_") as folder:
            longest_first = sorted(sources(), key=lambda source: -source.stat().st_size)  # so that no thread waits long
            objects = [str(Path(folder) / f"{i}.o") for i in range(len(longest_first))]

            def compile_one(source: Path, made: str) -> None:
                _run([*compiler, *flags, "-c", str(source), "-o", made])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, longest_first, objects))
            linked = Path(folder) / "linked.so"
            _run([*compiler, "-shared", *more, *objects, "-o", str(linked)])
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as part:
                try:
                    part.write(linked.read_bytes())
                    part.close()
                    os.chmod(part.name, 0o755)
                    os.replace(part.name, target)
                except BaseException:
                    Path(part.name).unlink(missing_ok=True)
                    raise
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}") from error
    return target


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"a C++ compiler is needed, and none of {shlex.join(given) or ', '.join(COMPILERS)} is in PATH")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{command[0]} failed: {reason}")
