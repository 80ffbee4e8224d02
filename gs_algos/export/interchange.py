"""Packed language models to and from the checkpoint formats of other libraries, one layer in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.export.folder import Folder, ShardWriter, opened, read_folder, whole_folder
from gs_algos.export.formats import awq, compressed_tensors, gptq
from gs_algos.export.formats.base import Format
from gs_algos.export.packed_config import METHOD, VERSION, PackedConfig, read_config
from gs_algos.export.skeleton import skeleton
from gs_algos.export.verify import check_tensors, verify_files
from gs_algos.quant.packed import PARTS, PackedFormat
from gs_algos.quant.packing import float_weight
from gs_kernels import PackedWeight
from gs_kernels.pack.checks import check_packed_values
from gs_kernels.pack.state import to_tensors

FORMATS: dict[str, Format] = {f.method: f for f in (compressed_tensors.FORMAT, gptq.FORMAT, awq.FORMAT)}


@dataclass(frozen=True)
class Exchanged:
    """What was written. layers: packed ones; floats: packed layers that the format has no place for, now floats."""

    folder: Path
    layers: int
    floats: tuple[str, ...]
    nbytes: int


def export_language_model(
    source: str | os.PathLike[str], target: str | os.PathLike[str], to: str, *, shard_bytes: int = 2**31
) -> Exchanged:
    """Writes a packed folder as the new folder `target` in the format `to`: the same codes, scales and zero points.

    Embeddings, layers tied to one, and for gptq and awq the output head become floats in the dtype of config.json.

    Args:
        to: "compressed-tensors", "gptq" or "awq".
        shard_bytes: largest tensor file.

    Raises:
        ValueError: if the source is no packed folder or is damaged, the target is not empty, or a layer has bits,
            groups or zero points that the format cannot hold.
    """
    who = "export_language_model"
    if to not in FORMATS:
        raise ValueError(f"{who}: to must be one of {', '.join(FORMATS)}, got {to!r}")
    format = FORMATS[to]
    folder = read_folder(source, who)
    where = f"{who}: {folder.path / 'config.json'}"
    config = read_config(folder.config.get("quantization_config"), where)
    check_tensors(folder, config, who)
    verify_files(folder.path, config.files, who)
    model = skeleton(folder.path, who)
    floats = _floats(model, config, format)
    writer = format.writer([f for name, f in config.layers.items() if name not in floats])
    if len(floats) == len(config.layers):
        raise ValueError(f"{who}: {folder.path} must have a packed linear layer that {to} can hold, got none")
    dtype = getattr(torch, str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32"))
    with whole_folder(target, who) as out, _reader(folder, who) as get:
        shards = ShardWriter(out, shard_bytes)
        for name, parts in _grouped(folder.tensors, config.layers).items():
            if parts is None:
                shards.add(name, get(name))
                continue
            weight = _packed(config.layers[name], {part: get(f"{name}.{part}") for part in parts})
            check_packed_values(who, weight, name)
            if name in floats:
                shards.add(f"{name}.weight", float_weight(model.get_submodule(name), weight, dtype))
                continue
            for part, tensor in writer.layer(name, weight).items():
                shards.add(f"{name}.{part}", tensor)
        shards.close()
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        kept = [name for name in linears if name not in config.layers or name in floats]
        _write_config(out, folder, writer.config(kept))
    return Exchanged(Path(target), len(config.layers) - len(floats), tuple(sorted(floats)), shards.nbytes)


def import_language_model(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, shard_bytes: int = 2**31
) -> Exchanged:
    """Reads a compressed-tensors, GPTQ or AWQ folder into the new packed folder `target`, exactly.

    Raises:
        ValueError: if the source is of no such format or is damaged, the target is not empty, or a layer has what
            ours have not: 3 bits, an act-order, quantized activations.
    """
    who = "import_language_model"
    folder = read_folder(source, who)
    where = f"{who}: {folder.path / 'config.json'}"
    settings = folder.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in FORMATS:
        advice = "it is packed already" if method == METHOD else "for a float model use quantize"
        raise ValueError(f"{where}: quant_method must be one of {', '.join(FORMATS)}, got {method!r}; {advice}")
    assert isinstance(settings, dict)
    format = FORMATS[method]
    reader = format.reader(settings, where)
    model = skeleton(folder.path, who)
    ends = f".{format.marker}"
    layers = [name.removesuffix(ends) for name in folder.tensors if name.endswith(ends)]
    if not layers:
        raise ValueError(f"{who}: {folder.path} must hold layers of {method}, got no tensor that ends in {ends}")
    formats: dict[str, PackedFormat] = {}
    with whole_folder(target, who) as out, _reader(folder, who) as get:
        shards = ShardWriter(out, shard_bytes)
        for name, parts in _grouped(folder.tensors, layers, format.parts).items():
            if parts is None:
                if not _idle_bias(name, layers, model, get):
                    shards.add(name, get(name))
                continue
            weight = reader.layer(name, {part: get(f"{name}.{part}") for part in parts})
            _check_shape(who, model, name, weight)
            formats[name] = PackedFormat.of(weight)
            for part, tensor in to_tensors(weight)[0].items():
                shards.add(f"{name}.{part}", tensor)
        shards.close()
        described = {name: format.to_dict() for name, format in formats.items()}
        about = {"quant_method": METHOD, "version": VERSION, "weights": f"from {method}", "layers": described}
        _write_config(out, folder, {**about, "tied": {}, "files": shards.hashes})
    return Exchanged(Path(target), len(formats), (), shards.nbytes)


def _floats(model: nn.Module, config: PackedConfig, format: Format) -> set[str]:
    """Packed layers that the format cannot hold."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()  # type: ignore[operator]
    shared = set(config.tied.values())
    return {
        name
        for name in config.layers
        if not isinstance(modules.get(name), nn.Linear)
        or name in shared
        or (modules[name] is head and not format.heads)
    }


def _grouped(tensors: Any, layers: Any, known: tuple[str, ...] = PARTS) -> dict[str, list[str] | None]:
    """In the order of the files: layer -> its parts, and for every other tensor its name -> None."""
    owners = set(layers)
    found: dict[str, list[str] | None] = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if layer in owners and part in known:
            parts = found.setdefault(layer, [])
            assert parts is not None
            parts.append(part)
        else:
            found[name] = None
    return found


def _packed(format: PackedFormat, tensors: dict[str, Tensor]) -> PackedWeight:
    zero: Any = tensors["zero"] if format.zero is None else format.zero
    levels = tensors.get("levels")
    return PackedWeight(tensors["codes"], tensors["scale"], zero, levels, format.bits, format.shape, format.group_size)


def _idle_bias(name: str, layers: list[str], model: nn.Module, get: Any) -> bool:
    """Whether a tensor is the bias of zeros that some packers add to layers that have none."""
    layer, _, part = name.rpartition(".")
    if part != "bias" or layer not in layers or getattr(model.get_submodule(layer), "bias", None) is not None:
        return False
    return not bool(get(name).any())


def _check_shape(who: str, model: nn.Module, name: str, weight: PackedWeight) -> None:
    layer = dict(model.named_modules()).get(name)
    shape = list(layer.weight.shape) if isinstance(layer, nn.Linear) else None
    if shape != list(weight.shape):
        has = f"of shape {shape}" if shape else "a linear layer of the model in config.json"
        raise ValueError(f"{who}: {name} must be {has}, got a packed weight of {list(weight.shape)}")


@contextmanager
def _reader(folder: Folder, who: str) -> Iterator[Any]:
    """A function that gives a tensor of the folder by name; files are opened as they are needed."""
    files: dict[Path, Any] = {}
    with ExitStack() as stack:

        def get(name: str) -> Tensor:
            file = folder.tensors[name]
            if file not in files:
                files[file] = stack.enter_context(opened(file, who))
            tensor: Tensor = files[file].get_tensor(name)
            return tensor

        yield get


def _write_config(out: Path, folder: Folder, entry: dict[str, Any]) -> None:
    config = {**folder.config, "quantization_config": entry}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for file in folder.companions():
        shutil.copyfile(file, out / file.name)
