"""Files that appear whole or not at all, beside other processes that read and write the same ones."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

OLD = 3600  # seconds after which nobody is writing a draft any more


def write_whole(path: Path, data: bytes) -> None:
    """Writes a draft beside the file and renames it, so that a reader sees the old file or the new one.

    Drafts of the same file that killed writers have left for an hour are deleted.

    Raises:
        OSError: if it cannot be written, with the path of the file. What was there before stays.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _clear_drafts(path)
        os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}; what was there is as before", str(path)) from error
        raise


def _clear_drafts(path: Path) -> None:
    form = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{16}")
    with contextlib.suppress(OSError):
        now = path.parent.stat().st_mtime  # by the clock that dates its files: a draft has just come
        for draft in path.parent.iterdir():
            if form.fullmatch(draft.name) and now - draft.stat().st_mtime > OLD:
                draft.unlink()
