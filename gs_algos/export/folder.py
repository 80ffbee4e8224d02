"""Transformers folders on disk: what is in them, read with care; and written to appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # tokenizer and generation files


@dataclass(frozen=True)
class Folder:
    """A Transformers folder with safetensors. tensors: name -> the file that holds it, in the order of the files."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Path]

    def companions(self) -> list[Path]:
        """Files that go with the weights: tokenizer, generation settings, licence."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and (file.suffix in COMPANIONS or file.name.upper().startswith("LICENSE"))
            and file.name != "config.json"
            and not file.name.endswith(".index.json")
        ]


def read_json(path: Path, who: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if it is not there, or no such thing.
    """
    if not path.is_file():
        raise ValueError(f"{who}: {path.parent} must be a Transformers folder with a {path.name}, got none")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} must be JSON, got {error}; it is damaged") from error
    if not isinstance(data, dict):
        raise ValueError(f"{who}: {path} must hold a JSON object, got {type(data).__name__}; it is damaged")
    return data


def read_folder(path: str | os.PathLike[str], who: str) -> Folder:
    """The folder, every tensor file opened once so that a missing or truncated one is found before any work.

    Raises:
        ValueError: if it is missing, has no safetensors, or a file is missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{who}: {folder} must be a Transformers folder or a GGUF file, got nothing there")
    config = read_json(folder / "config.json", who)
    files = [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = [folder / name for name in _shards(folder / INDEX, who)]
    elif not files[0].is_file():
        raise ValueError(
            f"{who}: {folder} must hold {SINGLE} or {INDEX}, got neither; "
            "load the model with transformers and save_pretrained it"
        )
    tensors: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{who}: {file} must be there, since {INDEX} names it; the folder is incomplete")
        tensors |= dict.fromkeys(tensor_names(file, who), file)
    return Folder(folder, config, tensors)


def _shards(index: Path, who: str) -> list[str]:
    weight_map = read_json(index, who).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{who}: {index} must have a weight_map of file names, got {weight_map!r:.80}; it is damaged")
    return sorted(names)


def tensor_names(file: Path, who: str) -> list[str]:
    """Names in a safetensors file; opening it checks that all its bytes are there."""
    with opened(file, who) as data:
        return list(data.keys())


@contextlib.contextmanager
def opened(file: Path, who: str) -> Iterator[Any]:
    """The open safetensors file; what is wrong with it becomes a ValueError."""
    try:
        with safe_open(file, "pt") as data:
            yield data
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}; it is damaged") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Collects tensors and writes them as `model-00001-of-0000N.safetensors` with an index, or as one file.

    hashes: once closed, the SHA-256 of every file by its name.

    Args:
        folder: where to; it exists.
        shard_bytes: a shard is written once it is that large, so this much is held in memory.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2**31) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.hashes: dict[str, str] = {}
        self.nbytes = 0
        self._size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self._size + size > self.shard_bytes:
            self._flush()
        # a copy: a view would keep the whole file or model that it looks into, and safetensors wants dense tensors
        self.pending[name] = tensor.detach().cpu().contiguous().clone()
        self._size += size
        self.nbytes += size

    def close(self) -> None:
        """Writes what is left, and gives the files the names that a reader looks for."""
        self._flush()
        if len(self.shards) == 1:
            self._name(0, SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.shards):
            final = f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
            self._name(i, final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))

    def _name(self, i: int, final: str) -> None:
        self.hashes[final] = sha256(self._part(i))
        os.replace(self._part(i), self.folder / final)

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def _flush(self) -> None:
        if self.pending:
            save_file(self.pending, self._part(len(self.shards)), metadata={"format": "pt"})
            self.shards.append(list(self.pending))
            self.pending, self._size = {}, 0


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike[str], who: str) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, in one rename; after an error nothing is there.

    A killed run leaves `.<name>.partial` beside the target, which the next run of the same target clears.

    Raises:
        ValueError: if the target is there already and not empty.
    """
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{who}: {path} must be new or an empty folder, got one with content; choose another or delete it"
        )
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            with open(file, "rb") as data:
                os.fsync(data.fileno())
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
