"""Writes files that appear whole or not at all, beside other processes that read and write the same ones.

What is being written has a name of its own beside its target: a dot, the target's name, 16 random hexadecimal digits.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

OLD = 3600  # seconds after which nobody is writing a draft any more


def write_whole(path: Path, data: bytes) -> None:
    """Writes a draft beside the file and renames it, so that a reader sees the old file or the new one.

    Drafts of the same file that killed writers have left for an hour are deleted.

    Raises:
        OSError: if it cannot be written, with the path of the file. What was there before stays.
    """
    draft = new_draft(path)
    with nothing_changed(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for old in filter(is_old, drafts_of(path)):
                with contextlib.suppress(OSError):
                    old.unlink()
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def nothing_changed(target: Path) -> Iterator[None]:
    """Raises an OSError of the block again as one of the target, which says that the target is as before."""
    try:
        yield
    except OSError as error:
        text = f"{error.strerror or error}; what was there is as before"
        raise OSError(error.errno, text, str(target)) from error


def new_draft(target: Path) -> Path:
    """Returns a path beside the target that nobody else writes to."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def drafts_of(target: Path) -> list[Path]:
    """Lists what was or is being written for a target, by any process."""
    form = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{16}")
    try:
        return [target.with_name(name) for name in os.listdir(target.parent) if form.fullmatch(name)]
    except OSError:  # of a folder that is not there, or in which one may write but not look
        return []


def is_old(path: Path) -> bool:
    """Returns whether a file, or the newest in a folder, is over an hour old by the clock that dates its neighbours."""
    try:
        newest = max(part.stat().st_mtime for part in (path, *(path.iterdir() if path.is_dir() else ())))
        return path.parent.stat().st_mtime - newest > OLD
    except OSError:
        return False
