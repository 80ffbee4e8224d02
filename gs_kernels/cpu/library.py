"""Loads the library of C++ kernels for the instructions of this CPU, as functions on pointers, by ctypes."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gs_kernels.cpu.compile import FOLDER, file_name, source_hash
from gs_kernels.runtime.instructions import instruction_set

logger = logging.getLogger(__name__)

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `of_kind` of floats.h

REMEDY = "run `python -m gs_kernels.cpu.build`, or install the package again, with a C++ compiler in PATH"

_problems: dict[str, str] = {}  # by what is concerned: why it is not used


def load_functions(
    who: str,
    functions: Mapping[str, Sequence[Any]],
    self_test: Callable[[Any], bool],
    structs: Sequence[type[ctypes.Structure]] = (),
) -> Any:
    """Returns the library once some functions of it are declared and checked; None, with a warning, if that fails.

    The functions return void.

    Args:
        who: the op that they compute, for messages.
        functions: the argument types of each.
        self_test: whether they compute what they should: an emulated CPU may lack instructions that it reports.
        structs: what their arguments point to. For each, `_Name` or `Name`, the library exports its size:
            `EXPORT const int64_t sizeof_Name = sizeof(Name);`.
    """
    found = library()
    if found is None:
        return None
    try:
        for name, argtypes in functions.items():
            function = getattr(found, name)
            function.argtypes, function.restype = argtypes, None
        for struct in structs:
            name = struct.__name__.lstrip("_")
            size = ctypes.c_int64.in_dll(found, f"sizeof_{name}").value
            if size != ctypes.sizeof(struct):
                raise ValueError(f"its struct {name} has {size} bytes, and {ctypes.sizeof(struct)} in Python")
    except (AttributeError, ValueError) as error:
        _refuse(who, f"the kernels in {found._name} are not those of this version ({error}); {REMEDY}")
        return None
    with _plain_defaults():
        passed = self_test(found)
    if not passed:
        _refuse(who, f"the kernels in {found._name} compute wrong results on this CPU")
        return None
    return found


@cache
def library() -> ctypes.CDLL | None:
    """Returns the library for this CPU, or None, with one warning, if it was not built or is not of this version."""
    path = path_of(instruction_set())
    if not path.is_file():
        _refuse("CPU kernels", f"{path} was not built; {REMEDY}")
        return None
    return open_library(path)


def path_of(name: str) -> Path:
    return FOLDER / file_name(name)


def open_library(path: Path) -> ctypes.CDLL | None:
    """Opens one library and gives it PyTorch's threads; None, with one warning, if it is not of this version."""
    try:
        found = ctypes.CDLL(str(path))
        built_from = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(found, "source_hash"))).value
    except (OSError, ValueError) as error:
        _refuse("CPU kernels", f"{path} cannot be loaded: {error}; {REMEDY}")
        return None
    if built_from != source_hash().encode():
        _refuse("CPU kernels", f"{path} was built from other sources; {REMEDY}")
        return None
    threads = _threads_of_pytorch()
    if threads is None:
        logger.warning("CPU kernels use one thread: this PyTorch has no OpenMP runtime that they know")
    else:
        found.use_threads(*(ctypes.cast(function, ctypes.c_void_p) for function in threads))
    return found


def _threads_of_pytorch() -> tuple[Any, Any, Any] | None:
    """Returns what starts a parallel region in PyTorch's OpenMP runtime, and two questions to it."""
    torch.get_num_threads()  # starts the runtime
    for place in [None, *map(str, (Path(torch.__file__).parent / "lib").glob("lib*omp*"))]:
        try:
            runtime = ctypes.CDLL(place)
            return runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads
        except (OSError, AttributeError):
            continue
    return None


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """Makes new tensors fp32 on the CPU, whatever the program has set as defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def problems() -> list[str]:
    """Says what does not run in C++ in this process, as it has been logged."""
    return [f"{who}: {why}" for who, why in _problems.items()]


def _refuse(who: str, why: str) -> None:
    if who not in _problems:
        _problems[who] = why
        logger.warning("%s run as tensor operations, several times slower: %s", who, why)
