"""Compiles C++ files for this CPU, keeps the libraries on disk and loads them as functions on pointers, by ctypes.

A library is compiled for the instruction sets of `instructions.vectors()`, which its file name tells, so that machines
of several kinds may share the cache folder: `golden_stick` in `TORCHINDUCTOR_CACHE_DIR` if that is set, else in the
user's cache folder or in the temporary folder. Where none can be written, each process compiles into one of its own.
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
_logged: set[str] = set()


def load_cpp(
    source: Path,
    functions: Mapping[str, Sequence[Any]],
    self_test: Callable[[Any], bool],
    structs: Sequence[type[ctypes.Structure]] = (),
) -> Any:
    """Compiles a C++ file and returns its functions, or None (with one warning) if compilation or a check fails.

    The functions return void. They may use OpenMP, `simd.h`, and any instructions that they enable by attributes.

    Args:
        functions: the argument types of each.
        self_test: whether they compute what they should: an emulated CPU may lack instructions that it reports.
        structs: what their arguments point to. For each, `_Name` or `Name`, the file exports its size:
            `extern "C" const int64_t sizeof_Name = sizeof(Name);`.
    """
    file = f"{source.parent.name}/{source.name}"
    try:
        with _lock:
            library = _library(source, file)
        for name, argtypes in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, None
    except (RuntimeError, OSError, AttributeError) as error:
        log_uncompiled(f"{file} is replaced by tensor operations", error)
        return None
    for struct in structs:
        name = struct.__name__.lstrip("_")
        size = _exported_size(library, name)
        if size != ctypes.sizeof(struct):
            text = "%s is replaced by tensor operations: its struct %s has %s bytes, and has %d bytes in Python"
            logger.warning(text, file, name, size, ctypes.sizeof(struct))
            return None
    if self_test(library):
        return library
    logger.warning("the compiled %s computes wrong results; the slower way is taken", file)
    return None


def _exported_size(library: ctypes.CDLL, name: str) -> int | str:
    try:
        return ctypes.c_int64.in_dll(library, f"sizeof_{name}").value
    except ValueError:
        return "none exported"


def log_uncompiled(what: str, error: BaseException) -> None:
    """Warns that something runs slower than it could; after the first time in a process, as INFO."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    level = logging.INFO if "uncompiled" in _logged else logging.WARNING
    _logged.add("uncompiled")
    text = "%s, several times slower: compiling failed (%s); install a C++ compiler"
    logger.log(level, text, what, reason)


def log_compiling(what: str, folder: Path | str) -> None:
    """Warns, once in a process, that a call takes seconds because it compiles, and the next one will not."""
    if "compiling" not in _logged:
        _logged.add("compiling")
        logger.warning("compiling for this CPU, once: %s; kept in %s", what, folder)


def _library(source: Path, file: str) -> ctypes.CDLL:
    """Loads the library from a cache folder, or compiles it; raises OSError or RuntimeError if neither works."""
    flags = (*FLAGS, *VECTORS[vectors()])
    inputs = (source.read_bytes(), HEADER.read_bytes(), " ".join(flags).encode(), platform.machine().encode())
    name = f"{source.parent.name}_{source.stem}_{hashlib.sha256(b'|'.join(inputs)).hexdigest()[:16]}.so"
    folders = _folders()
    for folder in folders:
        if (folder / name).is_file() and _is_ours(folder):
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError as error:  # of another system, or where nothing may be executed
                logger.info("%s is compiled again: %s", file, error)
    with _writable(folders) as place:
        log_compiling(file, place)
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
    """Lists the folders in which compiled code may be kept, the best first."""
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
    """Returns whether only this user and the administrator may put code there; True if there is no such folder."""
    if not folder.exists() or not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


@contextmanager
def _writable(folders: Sequence[Path]) -> Iterator[Path]:
    """Yields the first folder that can be written, or a temporary one: what was loaded from it stays loaded."""
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
    if "unwritable" not in _logged:
        _logged.add("unwritable")
        text = "compiled code cannot be kept, so every process compiles anew: %s; set TORCHINDUCTOR_CACHE_DIR"
        logger.warning(text, "; ".join(reasons))
    with tempfile.TemporaryDirectory(prefix="golden_stick_") as place:
        yield Path(place)


def _compile(source: Path, flags: Sequence[str], target: Path) -> Path:
    """Compiles to a draft and renames it, so that no other process loads half a library."""
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
    compiler = _which()
    if compiler is None:
        raise RuntimeError(f"none of {variable('CXX') or ', '.join(COMPILERS)} is in PATH")
    return compiler


def _which() -> list[str] | None:
    given = shlex.split(variable("CXX"))
    return next((c for c in ([given] if given else [[name] for name in COMPILERS]) if shutil.which(c[0])), None)
