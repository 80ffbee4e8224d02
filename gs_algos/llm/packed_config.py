"""Writes and reads `quantization_config`: what the config.json of a language model says of every packed layer.

    {"quant_method": "golden-stick", "version": 1, "weights": "int4@group:64:minmax:sym", "embeddings": null,
     "rules": [], "kv": "int8@token",
     "layers": {"model.layers.0.mlp.up_proj": {"bits": 4, "shape": [1536, 576], "group_size": 64, "zero": 8.0,
                                               "scale_dtype": "float16", "levels": false}, ...},
     "tied": {"lm_head": "model.embed_tokens"},
     "acts": {"model.layers.0.mlp.up_proj": "int8@token", ...},
     "rotations": {"model.layers.0.mlp.down_proj": {"input": {"block": 1536, "signs": "", ...}}, ...},
     "files": {"model.safetensors": "<SHA-256>", ...}}

Layer `L` has the tensors `L.codes`, `L.scale`, and if its `zero` is null `L.zero`, canonical as gs_kernels/pack
describes them; a tied layer has none. `acts` names the layers that round the rows they read; it may be missing.
`rotations` names the modules whose input or output is rotated as it runs, by the fields of `Rotation` in
gs_algos/quant/rotation.py; it may be missing. `kv` is the scheme of the cache of keys and values, see
gs_algos/ptq/kv.py; it may be missing, for floats.
`weights`, `embeddings` and `rules` only say how the layers came about. `files` are checked when the folder is loaded;
it may be missing, as it is in what Transformers saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gs_algos.core.plan import PlanRow
from gs_algos.ptq.kv import KVScheme
from gs_algos.quant.packed.linear import TOKEN
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.rotation import Rotation, checked_rotations
from gs_kernels.pack.layouts import BITS

METHOD = "golden-stick"
FOREIGN = ("compressed-tensors", "gptq", "awq", "mxfp4")
VERSION = 1
FIELDS = {
    "quant_method",
    "version",
    "weights",
    "embeddings",
    "rules",
    "kv",
    "layers",
    "tied",
    "acts",
    "rotations",
    "files",
}


@dataclass(frozen=True)
class PackedConfig:
    """Holds the packed layers, for each tied layer the one whose weight it uses, and the SHA-256 of each file.

    acts: the scheme of the rows that a layer reads, of those that round them.
    kv: the scheme of the cache of keys and values; None for floats.
    rotations: what a module rotates as it runs, by its name and side, `input` or `output`.
    """

    layers: dict[str, PackedFormat]
    tied: dict[str, str]
    files: dict[str, str]
    acts: dict[str, str] = field(default_factory=dict)
    kv: str | None = None
    rotations: dict[str, dict[str, Rotation]] = field(default_factory=dict)

    def names(self, owner: str) -> list[str]:
        """Lists the layers that share the owner's weight, itself first."""
        return [owner, *(name for name, lender in self.tied.items() if lender == owner)]


def to_config(rows: Iterable[PlanRow], settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Makes the dictionary for config.json from the rows of a plan. settings: the options of the packing."""
    packed = [row for row in rows if row.action == "pack"]
    layers = {row.site: row.settings.format.to_dict() for row in packed}
    tied = {name: row.site for row in packed for name in row.settings.names[1:]}
    acts = {row.site: row.settings.act for row in packed if row.settings.act is not None}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        **settings,
        "layers": layers,
        "tied": tied,
        **({"acts": acts} if acts else {}),
        "files": dict(files),
    }


def read_config(data: Any, where: str) -> PackedConfig:
    """Reads and checks the dictionary; where: names the file in errors.

    Raises:
        ValueError: if another library wrote it, a newer version did, or it is damaged.
    """
    method = data.get("quant_method") if isinstance(data, Mapping) else data
    if method != METHOD:
        advice = "convert it with golden-stick import" if method in FOREIGN else "load it with the library that made it"
        raise ValueError(f"{where}: quant_method must be {METHOD!r}, got {method!r}; {advice}")
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{where}: version must be at most {VERSION}, got {version!r}; update golden-stick")
    unknown = sorted(map(str, data.keys() - FIELDS))
    if unknown:
        raise ValueError(
            f"{where}: fields must be of {', '.join(sorted(FIELDS))}, got {unknown[0]!r}; update golden-stick"
        )
    layers, tied, files = data.get("layers"), data.get("tied", {}), data.get("files", {})
    if not isinstance(layers, Mapping) or not layers or not isinstance(tied, Mapping):
        raise ValueError(
            f"{where}: layers and tied must be objects, got {layers!r:.40} and {tied!r:.40}; it is damaged"
        )
    formats = {name: _format(name, entry, where) for name, entry in layers.items()}
    lost = [name for name, owner in tied.items() if owner not in formats or name in formats]
    if lost:
        raise ValueError(f"{where}: {lost[0]} must be tied to a packed layer, got {tied[lost[0]]!r}; it is damaged")
    if not isinstance(files, Mapping) or not all(Path(name).name == name for name in files):
        raise ValueError(f"{where}: files must map file names to SHA-256, got {files!r:.80}; it is damaged")
    acts = data.get("acts", {})
    if not isinstance(acts, Mapping) or not all(name in formats and act == TOKEN for name, act in acts.items()):
        raise ValueError(f"{where}: acts must map packed layers to {TOKEN!r}, got {acts!r:.80}; update golden-stick")
    kv = data.get("kv")
    if kv is not None:
        try:
            kv = str(KVScheme.parse(kv, where))
        except ValueError as error:
            raise ValueError(f"{error}; update golden-stick") from None
    rotations = checked_rotations(data.get("rotations", {}), where)
    return PackedConfig(formats, dict(tied), dict(files), dict(acts), kv, rotations)


def _format(name: str, entry: Any, where: str) -> PackedFormat:
    try:
        format = PackedFormat.from_dict(entry)
        n, k = format.shape
        right = (
            format.bits in BITS
            and min(n, k, format.group_size) > 0
            and k % format.group_size == 0
            and isinstance(getattr(torch, format.scale_dtype), torch.dtype)
            and (format.zero is None or isinstance(format.zero, int | float))
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{where}: {name} must be the format of a packed weight, got {entry!r:.200}; it is damaged")
    return format
