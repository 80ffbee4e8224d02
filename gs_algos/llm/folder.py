"""Reads Transformers folders, checking what is in them, and writes folders that appear whole or not at all.

Nothing in a folder is run: one whose settings name Python code of its own, or code to download, is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gs_algos.core.arguments import as_path, refuse_file_above
from gs_algos.core.files import being_written, publish_folder, scratch_folder, sha256

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # tokenizer and generation files
OBJECTS = (  # what Transformers reads beside config.json: each a JSON object
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
SETTINGS = "config.json"  # how the names of those files end that can name code
CODE = ("auto_map", "custom_pipelines", "custom_generate")
KERNELS = ("attn_implementation", "experts_implementation")  # "owner/name" is a kernel on the hub
LAYERS = re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?layers?")
COUNTS = re.compile(r".*(layer|block|expert|head|label|group|stage|codebook)s?|depths?")
MANY = 2**16  # more of what COUNTS names has no model; memory or a long loop would be the first to say so
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """Holds a Transformers folder with safetensors. tensors: name -> its file, in the order of the files."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Path]

    def companions(self) -> list[Path]:
        """Lists the files that go with the weights: tokenizer, generation settings, licence."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and (file.suffix in COMPANIONS or file.name.upper().startswith("LICENSE"))
            and file.name != "config.json"
            and not file.name.endswith(".index.json")
        ]

    def headers(self, who: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Reads name -> (dtype as safetensors writes it, shape) of every tensor from the headers of the files."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in dict.fromkeys(self.tensors.values()):
            with opened(file, who) as data:
                for name in data.keys():  # noqa: SIM118
                    if self.tensors.get(name) == file:
                        part = data.get_slice(name)
                        shapes[name] = (part.get_dtype(), tuple(part.get_shape()))
        return {name: shapes[name] for name in self.tensors}


def read_json(path: Path, who: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: if it is not there, or no such thing.
    """
    if not path.is_file():
        raise ValueError(f"{who}: {path.parent} must be a Transformers folder with a {path.name}, got none")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} must be JSON, got {error}; it is damaged") from error
    if not isinstance(data, dict):
        raise ValueError(f"{who}: {path} must hold a JSON object, got {type(data).__name__}; it is damaged")
    return data


def read_folder(path: str | os.PathLike[str], who: str, *, code: bool = False) -> Folder:
    """Reads a folder, and opens every tensor file once, so that a missing or truncated one is found before any work.

    Args:
        code: whether its settings may name code, since the caller has settled what becomes of that.

    Raises:
        ValueError: if it is missing, has no safetensors, a file is missing or damaged, or it names code to run.
    """
    folder = as_path(path, f"{who}: the source")
    if not folder.is_dir():
        raise ValueError(f"{who}: {folder} must be a Transformers folder or a GGUF file, got nothing there")
    config = read_json(folder / "config.json", who)
    if not code:
        refuse_code(folder, who)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"{who}: {folder} must hold a whole model, got {adapter.name} beside it; merge the adapter first"
        )
    tensors = _tensors(folder, who)
    refuse_counts(config, len(tensors), folder / "config.json", who)
    return Folder(folder, config, tensors)


def refuse_code(folder: Path, who: str) -> None:
    """Raises if a settings file of the folder names code to run, or is no JSON object.

    Raises:
        ValueError: so.
    """
    settings = sorted(file for file in folder.glob(f"*{SETTINGS}") if file.is_file())
    for file in dict.fromkeys([*settings, *(folder / name for name in OBJECTS)]):
        if not file.is_file():
            continue
        data = read_json(file, who)
        for key, value in entries(data) if file in settings else ():
            named = value if key in CODE and value else None
            if key.lstrip("_").removesuffix("_internal") in KERNELS:
                named = next((v for v in _leaves(value) if isinstance(v, str) and "/" in v), None)
            if named is not None:
                raise ValueError(
                    f"{who}: {file} must name no code to run, got {key} {named!r:.120}; nothing of a folder is run "
                    f"here: if the installed Transformers has this model itself, take {key} out"
                )
    if (folder / "custom_generate").exists():
        raise ValueError(f"{who}: {folder} must hold no code to run, got custom_generate; take it out")


def refuse_counts(config: dict[str, Any], tensors: int, path: Path, who: str) -> None:
    """Raises if a config asks for more layers than there are tensors, or for absurdly many of something.

    Raises:
        ValueError: so.
    """
    for key, value in entries(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = tensors if LAYERS.fullmatch(key) else MANY if COUNTS.fullmatch(key) else None
            if most is not None and not value <= most:
                held = f"the {tensors} tensors beside it" if most == tensors else f"{MANY:,}"
                raise ValueError(f"{who}: {key} in {path} must be at most {held}, got {value!r:.24}; it is damaged")


def entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key of the objects in JSON data with its value, however deep."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value


def _leaves(data: Any) -> list[Any]:
    return [data] if not isinstance(data, dict) else [value for _, value in entries(data)]


def _tensors(folder: Path, who: str) -> dict[str, Path]:
    """Returns name -> file of every tensor.

    Raises:
        ValueError: if files are missing, damaged, or not those that the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if not single.is_file():
            others = sorted(file.name for file in folder.glob("*.safetensors"))
            raise ValueError(
                f"{who}: {folder} must hold {SINGLE} or {INDEX}, got {', '.join(others[:3]) or 'neither'}; "
                + (
                    f"rename it to {SINGLE}"
                    if len(others) == 1
                    else "load the model with transformers and save_pretrained it"
                )
            )
        return dict.fromkeys(tensor_names(single, who), single)
    weight_map = _weight_map(index, who)
    tensors: dict[str, Path] = {}
    for file in (folder / name for name in sorted(set(weight_map.values()))):
        if not file.is_file():
            raise ValueError(f"{who}: {file} must be there, since {INDEX} names it; the folder is incomplete")
        names = tensor_names(file, who)
        twice = next((name for name in names if name in tensors), None)
        if twice is not None:
            raise ValueError(f"{who}: {twice} must be in one file, got it in {tensors[twice]} and {file}; delete one")
        tensors |= dict.fromkeys(names, file)
    for name, where in weight_map.items():
        if name not in tensors or tensors[name].name != where:
            got = "no file that has it" if name not in tensors else f"it in {tensors[name].name}"
            raise ValueError(f"{who}: {folder / where} must hold {name} as {INDEX} says, got {got}; it is damaged")
    if single.is_file() and single.name not in weight_map.values():
        raise ValueError(f"{who}: {folder} must hold {SINGLE} or {INDEX}, got both; delete what is not the model")
    return tensors


def _weight_map(index: Path, who: str) -> dict[str, str]:
    weight_map = read_json(index, who).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{who}: {index} must have a weight_map of file names, got {weight_map!r:.80}; it is damaged")
    assert isinstance(weight_map, dict)
    return weight_map


def tensor_names(file: Path, who: str) -> list[str]:
    """Reads the names in a safetensors file; opening it checks that all its bytes are there."""
    with opened(file, who) as data:
        return list(data.keys())


def nbytes_of(headers: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Counts the bytes of tensors with these dtypes and shapes."""
    return sum(math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1) for dtype, shape in headers)


@contextlib.contextmanager
def opened(file: Path, who: str) -> Iterator[Any]:
    """Opens a safetensors file; what is wrong with it becomes a ValueError."""
    try:
        with safe_open(file, "pt") as data:
            yield data
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}; it is damaged") from error


@contextlib.contextmanager
def opened_all(folder: Folder, who: str) -> Iterator[Callable[[str], Tensor]]:
    """Yields a function that reads a tensor of the folder by name; files are opened when they are needed."""
    files: dict[Path, Any] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Tensor:
            file = folder.tensors[name]
            if file not in files:
                files[file] = stack.enter_context(opened(file, who))
            tensor: Tensor = files[file].get_tensor(name)
            return tensor

        yield get


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
    """Yields a folder to write into, which becomes `target` at the end in one rename; after an error nothing is there.

    A killed run leaves `.<name>.<digits>` beside the target, which the next run of the same target clears.

    Raises:
        ValueError: if the target is there already and not empty, or another process is writing it.
        OSError: if it cannot be written.
    """
    path = as_path(target, f"{who}: the target")
    refuse_file_above(path, f"{who}: the target")
    todo = "choose another or delete it"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        there = "one with content" if path.is_dir() else "a file"
        raise ValueError(f"{who}: {path} must be new or an empty folder, got {there}; {todo}")
    if being_written(path):
        raise ValueError(f"{who}: {path} must be for this call alone, got one that another call is writing now")
    shutil.rmtree(path.parent / f".{path.name}.partial", ignore_errors=True)  # of versions before this one
    with scratch_folder(path) as folder:
        try:
            yield folder
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
            publish_folder(folder, path)
        except FileExistsError as error:
            raise ValueError(
                f"{who}: {path} must be new or an empty folder, got one that was filled meanwhile; {todo}"
            ) from error
        except Exception as error:
            named, number = getattr(error, "filename", None), _number_of(error)
            if number is None or (named is not None and folder not in Path(named).parents):
                raise
            # a full disk, which neither Python nor safetensors says the place of
            where = path if named is None else path / Path(named).relative_to(folder)
            what = getattr(error, "strerror", None) or error
            raise OSError(
                number, f"{who}: the folder cannot be written, got {what}; none is left", str(where)
            ) from error


def _number_of(error: Exception) -> int | None:
    """Returns the number of the system's error that keeps something from being written; None of another error."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    told = re.search(r"\(os error (\d+)\)", str(error))  # in the words of safetensors and tokenizers
    return int(told[1]) if told else errno.EIO if isinstance(error, SafetensorError) else None
