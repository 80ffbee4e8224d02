"""Writes files and folders that appear whole or not at all, beside other processes that write and read the same ones.

What is being written has a name of its own beside its target (see `gs_kernels.runtime.files`). Its writer holds a lock
on it (`flock`, which ends with the process), so that the next writer of the same target can tell what a killed one left
and delete it. Where a file system has no such locks, and on Windows, an hour tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gs_kernels.runtime.files import drafts_of, is_old, new_draft, nothing_changed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WINDOWS = os.name == "nt"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one, whole.

    Raises:
        OSError: if it cannot be written, with the target's path. What was there before stays.
    """
    with written(path, data):
        pass


@contextlib.contextmanager
def naming_target(target: Path) -> Iterator[None]:
    """Makes every OSError inside name the target, whatever draft of it could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(target):
            raise
        raise OSError(error.errno, f"{error.strerror or error}; nothing was written", str(target)) from error


@contextlib.contextmanager
def written(path: Path, data: bytes) -> Iterator[None]:
    """Writes as `write_atomically`; inside the `with` block the new file counts as being written (see `abandoned`)."""
    clear_abandoned(path)
    file: IO[bytes] | None = None
    with nothing_changed(path):
        try:
            file = _new_file(path)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if WINDOWS:  # which renames no open file
                file.close()
            with _synced(path.parent):
                _replace(file.name, path)
        except BaseException:
            if file is not None:
                with contextlib.suppress(OSError):  # it tries once more to write
                    file.close()
                Path(file.name).unlink(missing_ok=True)
            raise
    try:
        yield
    finally:
        file.close()


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside the target to write into, and deletes it afterwards, unless the caller has renamed it.

    Raises:
        OSError: if there can be none, with the target's path.
    """
    with naming_target(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(target)
    while True:
        folder = new_draft(target)
        with naming_target(target):
            folder.mkdir()
        handle = None if WINDOWS else os.open(folder, os.O_RDONLY)
        if handle is None or _is_ours(handle, folder):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def publish_folder(folder: Path, target: Path) -> None:
    """Renames a finished scratch folder to its target, whose place must be free or an empty folder, and all is on disk.

    Raises:
        FileExistsError: if the target is a file, or has content.
    """
    for file in folder.iterdir():
        with open(file, "rb") as data:
            os.fsync(data.fileno())
    with _synced(folder):
        pass
    with _synced(target.parent):
        try:
            if target.is_dir():
                target.rmdir()
            os.rename(folder, target)
        except OSError as error:
            if target.exists():
                what = "a folder with content" if target.is_dir() else "a file"
                raise FileExistsError(error.errno, f"{what} is there", str(target)) from error
            raise


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields a path to write to, in a folder of its own; at the end all of that folder moves beside the target.

    The target comes last, so that what it names is there. After an error nothing is there.
    """
    with scratch_folder(target) as folder, naming_target(target):
        yield folder / target.name
        files = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
        for file in files:
            with open(file, "rb") as data:
                os.fsync(data.fileno())
        with _synced(target.parent):
            for file in files:
                _replace(str(file), target.with_name(file.name))


def being_written(target: Path) -> bool:
    """Says whether another process, or another thread, is writing the target at this moment."""
    return any(not abandoned(path) for path in drafts_of(target))


def clear_abandoned(target: Path) -> None:
    """Deletes what killed writers of the target left behind."""
    for path in drafts_of(target):
        if abandoned(path):
            remove(path)


def abandoned(path: Path) -> bool:
    """Says whether nobody is writing a file or folder any more: it is no draft, or its writer was killed."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return is_old(path)
    try:
        free = _lock(handle, wait=False)
    finally:
        os.close(handle)
    return is_old(path) if free is None else free


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there and can be: a reader on Windows keeps it until the next time."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError, PermissionError):
        path.unlink()


@contextlib.contextmanager
def _synced(folder: Path) -> Iterator[None]:
    """Makes the names in a folder outlast a power failure, where a folder can be opened and synchronized."""
    try:
        handle = None if WINDOWS else os.open(folder, os.O_RDONLY)
    except OSError:  # one may write in it but not look
        handle = None
    try:
        yield
        if handle is not None:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(handle)
    finally:
        if handle is not None:
            os.close(handle)


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _replace(source: str, target: Path) -> None:
    """Calls `os.replace`, for up to a second: Windows refuses it for as long as somebody reads the target."""
    for left in reversed(range(50)):
        try:
            os.replace(source, target)
        except PermissionError:
            if not WINDOWS or not left:
                raise
            time.sleep(0.02)
        else:
            return


def _new_file(target: Path) -> IO[bytes]:
    """Makes a locked draft of a file, anew if another writer deleted it as abandoned before it was locked."""
    while True:
        path = new_draft(target)
        file = open(path, "xb")  # noqa: SIM115
        if _is_ours(file.fileno(), path):
            return file
        file.close()


def _is_ours(handle: int, path: Path) -> bool:
    """Locks what was just made, where there are locks; False if it has been deleted meanwhile."""
    _lock(handle, wait=True)
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(handle: int, wait: bool) -> bool | None:
    """Takes the lock on an open file or folder: whether it did, None if there are no such locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
