"""Packs a folder of Triton's cache into one file, and unpacks it in any other place.

Triton's keys hold no path, but its lists of a kernel's files (`__grp__*.json`) do: in the archive they hold names,
which become paths when it is unpacked. Sources of kernels (`*.source`), which nothing reads, are left out of both: to
Triton a list with a file that is missing is none.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from gs_kernels.runtime.files import write_whole

MANIFEST = "manifest.json"
FORMAT = 1
GROUP = "__grp__"


def pack(folder: Path, archive: Path, about: dict[str, Any]) -> int:
    """Writes the archive, whole or not at all; about: what it was made with. Returns the number of files."""
    files = sorted(p for p in folder.glob("*/*") if p.is_file() and p.suffix != ".source" and p.name != "lock")
    known, buffer = set(files), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        text = json.dumps({"format": FORMAT, **about}, indent=1).encode()
        head = tarfile.TarInfo(MANIFEST)
        head.size = len(text)
        tar.addfile(head, io.BytesIO(text))
        for path in files:
            data = path.read_bytes()
            if path.name.startswith(GROUP):
                kept = [name for name in json.loads(data)["child_paths"] if path.with_name(name) in known]
                data = json.dumps({"child_paths": {name: name for name in kept}}).encode()
            member = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    write_whole(archive, buffer.getvalue())
    return len(files)


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Unpacks into a folder of a cache, beside what is there, and returns what the archive was made with.

    Raises:
        ValueError: if the file is no such archive.
        OSError: if it cannot be read, or the folder not be written.
    """
    about: dict[str, Any] | None = None
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                parts = PurePosixPath(member.name).parts
                data = b"" if stream is None else stream.read()
                if parts == (MANIFEST,):
                    about = json.loads(data)
                    continue
                if stream is None or len(parts) != 2 or ".." in parts or parts[0] == "/":
                    raise ValueError(f"a member is {member.name}")
                if parts[1].startswith(GROUP):
                    data = _moved(data, folder / parts[0])
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(
            f"bench.gpu: {archive} must be an archive of --precompile, got {error}; make it again"
        ) from error
    if about is None or about.get("format") != FORMAT:
        raise ValueError(f"bench.gpu: {archive} must have format {FORMAT}, got {about}; make it again")
    return about


def _moved(data: bytes, folder: Path) -> bytes:
    names = json.loads(data)["child_paths"]
    return json.dumps({"child_paths": {name: str(folder / name) for name in names}}).encode()
