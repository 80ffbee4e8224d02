"""Checks paths, seeds and devices where a caller gives them, so that an error names the caller."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch


def as_path(path: str | os.PathLike[str], who: str) -> Path:
    """Returns the path, checked.

    who: the caller and its argument, for messages, e.g. "load: directory".

    Raises:
        TypeError: if it is no path.
        ValueError: if no file system could have it, or that of this machine cannot.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{who} must be a path, text or os.PathLike, got {path!r:.60}")
    if "\0" in os.fspath(path):
        raise ValueError(f"{who} must be a path, which has no NUL character, got {os.fspath(path)!r:.60}")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            text = os.fspath(path)
            raise ValueError(
                f"{who} must be a path that this file system can have, got {text!r:.60} of {len(text):,} characters: "
                f"{error.strerror}"
            ) from error
    except ValueError as error:  # what the system's encoding has no bytes for
        raise ValueError(f"{who} must be a path, got {os.fspath(path)!r:.60}: {error}") from error
    return Path(path)


def refuse_unwritable(path: Path, who: str) -> None:
    """Raises PermissionError if the nearest folder above the path that is there may not be written to."""
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{who} must be in a folder that can be written to, got", str(above))


def as_seed(seed: int, who: str) -> int:
    """Returns the seed, checked, from which others are made by multiplying and adding.

    who: the caller and its argument, for messages, e.g. "demo: --seed".

    Raises:
        ValueError: if it is no whole number of 32 bits.
    """
    if type(seed) is not int or not -(2**31) <= seed < 2**32:
        raise ValueError(f"{who} must be within 32 bits, got {seed!r:.60}")
    return seed


def memory_bytes() -> int:
    """Returns the bytes of memory that this machine has; of a system that does not say, as many as can be addressed."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return sys.maxsize


def refuse_file_above(path: Path, who: str) -> None:
    """Raises ValueError if the path cannot be made: it has no name of its own, or the nearest thing above is a file."""
    if path.name in ("", ".."):
        raise ValueError(f"{who} must have a name of its own, got {str(path)!r}; give the name of a new folder or file")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{who} must be in a folder, got {above}, which is a file; choose another place")


def refuse_file(path: Path, who: str) -> None:
    """Raises FileExistsError if the path cannot be a folder, since it or the nearest thing above it is a file."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        words = f"{who} must be a folder or a free place in one, got a file in its way; choose another"
        raise FileExistsError(errno.EEXIST, words, str(there))


def as_device(device: torch.device | str, who: str) -> torch.device:
    """Returns the device, which must be of this machine and hold data.

    Raises:
        TypeError: if it is no device.
        ValueError: if it names none, one that is not here, or meta.
    """
    if not isinstance(device, torch.device | str):
        raise TypeError(f"{who}: device must be text such as 'cpu' or a torch.device, got {device!r:.60}")
    usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"{who}: device must be {usable} on this machine, got {str(device)!r}") from error
    if parsed.type == "meta":
        raise ValueError(f"{who}: device must be one that holds data, {usable}, got 'meta'")
    return parsed
