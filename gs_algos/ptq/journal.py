"""Keeps what was found for every block in a folder, so that a calibration that was killed goes on where it was.

`journal.json` holds a digest of the weights, the options and the data; `block-00012.safetensors` the codes, scales,
zero points and biases of one block, and the norms that transforms changed. Each file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from gs_algos.core.files import clear_abandoned, write_atomically
from gs_algos.ptq.report import LayerReport
from gs_algos.quant.packed.grid import Grid
from gs_algos.quant.scheme import Scheme
from gs_kernels.runtime.torch_private import tree_leaves

VERSION = 1
NAME = "journal.json"
ACTIVATIONS = "activations"  # target of the folders that a calibration keeps them in


@dataclass(frozen=True)
class Solved:
    """Holds what was found for one weight: its grid, its codes `[N, K]`, the bias `[N]` if it has another one now.

    moved: float parameters of other layers that transforms of its input changed, by name.
    fraction: `[N, K]` how many steps the target is above the codes, of a weight that is still to be tuned.
    """

    grid: Grid
    codes: Tensor
    bias: Tensor | None
    report: LayerReport
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    fraction: Tensor | None = None


class Journal:
    """Writes and reads the blocks of one calibration. folder: None keeps nothing."""

    def __init__(self, folder: Path | None, who: str) -> None:
        self.folder, self.who = folder, who

    def begin(self, digest: str) -> int:
        """Opens the folder for a calibration with this digest; returns how many blocks it holds already.

        Raises:
            ValueError: if the folder is of another calibration, or no folder of a journal.
        """
        if self.folder is None:
            return 0
        path = self.folder / NAME
        for abandoned in (path, self.folder / ACTIVATIONS):
            clear_abandoned(abandoned)
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{self.who}: {path} must be a journal, got no JSON; use another folder") from error
            if not isinstance(found, Mapping) or found.get("version") != VERSION:
                raise ValueError(f"{self.who}: {path} must be a journal of version {VERSION}; use another folder")
            if found.get("digest") != digest:
                raise ValueError(
                    f"{self.who}: the journal must be of this model, these options and this data, got {self.folder} of "
                    "others; use another folder, or delete it"
                )
            return sum(1 for _ in self.folder.glob("block-*.safetensors"))
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.who}: the journal must be an empty folder or a journal, got {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"version": VERSION, "digest": digest}).encode())
        return 0

    def write(self, index: int, solved: Mapping[str, Solved]) -> None:
        """Keeps what was found for one block."""
        if self.folder is not None:
            write_atomically(self._file(index), to_bytes(solved))

    def read(self, index: int) -> dict[str, Solved] | None:
        """Returns what was found for one block, or None.

        Raises:
            ValueError: if the file is damaged.
        """
        if self.folder is None or not self._file(index).is_file():
            return None
        path = self._file(index)
        try:
            return from_bytes(path.read_bytes())
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            must = f"{self.who}: {path} must be a block of a journal"
            raise ValueError(f"{must}, got a damaged file; delete it") from error

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:05}.safetensors"


def to_bytes(solved: Mapping[str, Solved]) -> bytes:
    """Writes what was found for some weights in the form of safetensors."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for site, one in solved.items():
        tensors[f"{site}.codes"] = one.codes.contiguous()
        tensors[f"{site}.scale"], tensors[f"{site}.zero"] = one.grid.scale.contiguous(), one.grid.zero.contiguous()
        if one.grid.divisor is not None:
            tensors[f"{site}.divisor"] = one.grid.divisor
        if one.bias is not None:
            tensors[f"{site}.bias"] = one.bias.contiguous()
        if one.fraction is not None:
            tensors[f"{site}.fraction"] = one.fraction.contiguous()
        dtype = str(one.grid.dtype).removeprefix("torch.")
        tensors |= {f"{site}.moved.{name}": tensor.contiguous() for name, tensor in one.moved.items()}
        about[site] = {
            "scheme": str(one.grid.scheme),
            "dtype": dtype,
            "report": one.report.to_dict(),
            "moved": list(one.moved),
        }
    return save(tensors, {"solved": json.dumps(about)})


def from_bytes(data: bytes) -> dict[str, Solved]:
    """Reads what `to_bytes` wrote. What is wrong with other data is told by one of many exceptions."""
    tensors = load(data)
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["solved"])
    return {
        site: Solved(
            Grid(
                tensors[f"{site}.scale"],
                tensors[f"{site}.zero"],
                Scheme.parse(one["scheme"], "weight"),
                getattr(torch, one["dtype"]),
                tensors.get(f"{site}.divisor"),
            ),
            tensors[f"{site}.codes"],
            tensors.get(f"{site}.bias"),
            LayerReport.from_dict(one["report"]),
            {name: tensors[f"{site}.moved.{name}"] for name in one["moved"]},
            tensors.get(f"{site}.fraction"),
        )
        for site, one in about.items()
    }


def digest_of(model: nn.Module, options: Mapping[str, Any], batches: Iterable[Any]) -> str:
    """Returns a SHA-256 of a model's tensors, the options and the data."""
    sha = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _add(sha, name, tensor)
    for number, batch in enumerate(batches):
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                _add(sha, str(number), leaf)
            else:
                sha.update(repr(leaf).encode())
    return sha.hexdigest()


def _add(sha: Any, name: str, tensor: Tensor) -> None:
    sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def journal_at(folder: str | os.PathLike[str] | None, who: str) -> Journal:
    """Returns the journal in a folder; one that keeps nothing for None."""
    return Journal(None if folder is None else Path(folder), who)
