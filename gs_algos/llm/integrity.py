"""Checks that the tensor files of a packed folder are those that its config.json describes, before any is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

from gs_algos.core.files import sha256
from gs_algos.llm.folder import Folder, opened
from gs_algos.llm.packed_config import PackedConfig
from gs_algos.quant.packed.module import tensors_of

_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Leaves out the hashing of files inside if `trust`: for models so large that reading them twice takes long."""
    token = _trusting.set(trust)
    try:
        yield
    finally:
        _trusting.reset(token)


def verify_files(folder: Path, files: Mapping[str, str], who: str) -> None:
    """Raises unless every file has its SHA-256.

    Raises:
        ValueError: if one is missing or has other bytes.
    """
    for name, digest in {} if _trusting.get() else files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{who}: {path} must be there, since config.json names it; the folder is incomplete")
        got = sha256(path)
        if got != digest:
            raise ValueError(f"{who}: {path} must have SHA-256 {digest}, got {got}; the file is damaged")


def check_tensors(
    folder: Folder, config: PackedConfig, who: str, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raises unless the folder holds every tensor of its packed layers, in the shape that config.json says.

    Args:
        names: of tensors in the model -> in the folder, where these differ.
    """
    wanted = {
        names.get(f"{name}.{part}", f"{name}.{part}"): list(tensor.shape)
        for name, format in config.layers.items()
        for part, tensor in tensors_of(format.empty("meta")).items()
    }
    for name in wanted:
        if name not in folder.tensors:
            raise ValueError(f"{who}: {folder.path} must hold {name}, which config.json describes; it is damaged")
    for file in dict.fromkeys(folder.tensors[name] for name in wanted):
        with opened(file, who) as data:
            for name, shape in wanted.items():
                if folder.tensors[name] == file and data.get_slice(name).get_shape() != shape:
                    got = data.get_slice(name).get_shape()
                    raise ValueError(f"{who}: {name} must be {shape} as config.json says, got {got} in {file}")


def part_names(config: PackedConfig) -> set[str]:
    """Returns the names of all tensors of the packed layers."""
    return {f"{name}.{part}" for name, format in config.layers.items() for part in tensors_of(format.empty("meta"))}
