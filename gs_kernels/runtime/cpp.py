"""Files of C++, compiled once per kind of CPU, kept on disk and loaded as plain functions on pointers.

They are compiled for the instruction sets of `instructions.vectors()`, which a file in the folder is named by, so that
machines of several kinds may share a folder. It is `golden_stick` in `TORCHINDUCTOR_CACHE_DIR` where that is set, else
in the user's folder of caches or of temporary files; where none can be written, one of this process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gs_kernels.runtime.dispatch import variable
from gs_kernels.runtime.instructions import vectors

logger = logging.getLogger(__name__)

HEADER = Path(__file__).parent / "simd.h"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
VECTORS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "": (),
}
COMPILERS = ("g++", "c++", "clang++")

_lock = threading.RLock()
_said: set[str] = set()


def native(source: Path, functions: Mapping[str, Sequence[Any]], is_right: Callable[[Any], bool]) -> Any:
    """Compiles a C++ file and returns its void functions, or None, which is said once, if that fails or one is wrong.

    They may use OpenMP, `simd.h`, and any instructions that they name themselves by attributes.

    Args:
        functions: the types of their arguments.
        is_right: whether they compute what they should: a CPU that is emulated may lack instructions that it reports.
    """
    file = f"{source.parent.name}/{source.name}"
    try:
        with _lock:
            library = _library(source, file)
        for name, argtypes in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, None
    except (RuntimeError, OSError, AttributeError) as error:
        say_uncompiled(f"{file} is replaced by tensor operations", error)
        return None
    if is_right(library):
        return library
    logger.warning("the compiled %s computes wrong results; the slower way is taken", file)
    return None


def say_uncompiled(what: str, error: BaseException) -> None:
    """Says, as a warning once in a process, that something runs slower than it could."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    level = logging.INFO if "uncompiled" in _said else logging.WARNING
    _said.add("uncompiled")
    text = "%s, several times slower: compiling failed (%s); install a C++ compiler"
    logger.log(level, text, what, reason)


def say_compiling(what: str, folder: Path | str) -> None:
    """Says, once in a process, why a call takes seconds, and that it does not the next time."""
    if "compiling" not in _said:
        _said.add("compiling")
        logger.warning("compiling for this CPU, once: %s; kept in %s", what, folder)


def _library(source: Path, file: str) -> ctypes.CDLL:
    """Raises OSError or RuntimeError, with the reason, if there is none."""
    flags = (*FLAGS, *VECTORS[vectors()])
    about = (source.read_bytes(), HEADER.read_bytes(), " ".join(flags).encode(), platform.machine().encode())
    name = f"{source.parent.name}_{source.stem}_{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}.so"
    folders = _folders()
    for folder in folders:
        if (folder / name).is_file() and _is_ours(folder):
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError as error:  # of another system, or where nothing may be executed
                logger.info("%s is compiled again: %s", file, error)
    with _writable(folders) as place:
        say_compiling(file, place)
        try:
            return _load(_compile(source, flags, place / name), place)
        except OSError as error:
            with tempfile.TemporaryDirectory(prefix="golden_stick_") as other:
                logger.info("%s is loaded from a temporary folder: %s", file, error)
                return _load(_compile(source, flags, Path(other) / name), Path(other))


def _load(path: Path, place: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "failed to map" not in str(error):
            raise
        raise OSError(
            f"{place} is mounted so that nothing in it may be executed; set TORCHINDUCTOR_CACHE_DIR"
        ) from error


def _folders() -> list[Path]:
    """Where compiled code may be kept, the best first."""
    given = variable("TORCHINDUCTOR_CACHE_DIR")
    temporary = Path(tempfile.gettempdir())
    # PyTorch itself sets the variable to its default, in the middle of a process
    if given and not (Path(given).parent == temporary and Path(given).name.startswith("torchinductor_")):
        return [Path(given).absolute() / "golden_stick"]
    folders = [temporary / f"golden_stick_{os.getuid()}"] if hasattr(os, "getuid") else []
    root = variable("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # nobody's home
        folders.insert(0, (Path(root) if root else Path.home() / ".cache").absolute() / "golden_stick")
    return folders


def _is_ours(folder: Path) -> bool:
    """Whether nobody else, but for the administrator, may put code there; so also if there is no such folder."""
    if not folder.exists() or not hasattr(os, "getuid"):
        return True
    about = folder.stat()
    return about.st_uid in (0, os.getuid()) and not about.st_mode & 0o022


@contextmanager
def _writable(folders: Sequence[Path]) -> Iterator[Path]:
    """The first of the folders that can be written, or one that is gone afterwards: what was loaded stays loaded."""
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if not _is_ours(folder):
                raise PermissionError(f"others may write into {folder}")
        except OSError as error:
            reasons.append(str(error))
        else:
            yield folder
            return
    if "unwritable" not in _said:
        _said.add("unwritable")
        text = "compiled code cannot be kept, so every process compiles anew: %s; set TORCHINDUCTOR_CACHE_DIR"
        logger.warning(text, "; ".join(reasons))
    with tempfile.TemporaryDirectory(prefix="golden_stick_") as place:
        yield Path(place)


def _compile(source: Path, flags: Sequence[str], target: Path) -> Path:
    """Writes the target at once, so that no other process loads a part of it."""
    compiler = _compiler()
    handle, part = tempfile.mkstemp(prefix=target.stem, suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        for threads in (("-fopenmp",), ()):  # one thread is better than none
            command = [*compiler, *flags, *threads, f"-I{HEADER.parent}", str(source), "-o", part]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode == 0:
                os.replace(part, target)
                return target
    finally:
        Path(part).unlink(missing_ok=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    raise RuntimeError(f"{shlex.join(compiler)}: {lines[0]}")


def _compiler() -> list[str]:
    found = _which()
    if found is None:
        raise RuntimeError(f"none of {variable('CXX') or ', '.join(COMPILERS)} is in PATH")
    return found


def _which() -> list[str] | None:
    given = shlex.split(variable("CXX"))
    return next((c for c in ([given] if given else [[name] for name in COMPILERS]) if shutil.which(c[0])), None)
