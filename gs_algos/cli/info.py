"""Runs `golden-stick info`: says what a path is, from its settings and headers; nothing of it is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gs_algos.cli.compress import RECIPE_FILE
from gs_algos.cli.demo import OPTIONS_FILE
from gs_algos.cli.info_network import describe
from gs_algos.core.checkpoint import INDEX
from gs_algos.core.plan import render_layers
from gs_algos.export.torch_package import read_package
from gs_algos.llm.folder import Folder, nbytes_of, read_folder, read_json
from gs_algos.llm.foreign_config import settings_of
from gs_algos.llm.integrity import part_names
from gs_algos.llm.load import gguf_skeleton, is_gguf
from gs_algos.llm.packed_config import METHOD, read_config
from gs_algos.pipeline.pipeline import INDEX as PIPELINE_FILE
from gs_algos.quant.packed.float_grid import NAMES
from gs_algos.quant.packed.module import PackedFormat

WHO = "info"
RUNS = {OPTIONS_FILE: "demo", RECIPE_FILE: "compress", PIPELINE_FILE: "Pipeline"}  # file -> what writes it


def describe_path(path: Path) -> str:
    """Describes a checkpoint, a run's folder, a language model's folder, a GGUF file or a `.pt2` package.

    Raises:
        ValueError: if it is none of these, or is damaged.
    """
    if path.is_dir():
        if (path / INDEX).is_file():
            return describe(path)
        if any((path / file).is_file() for file in RUNS):
            return _run(path)
        if (path / "config.json").is_file():
            return _language_model(read_folder(path, WHO))
    elif path.suffix == ".pt2" and path.is_file():
        return _package(path)
    elif path.suffix == ".gguf" and is_gguf(path):
        return _gguf(path)
    if not path.exists():
        got = "nothing there"
    elif path.is_dir():
        got = f"a folder with {', '.join(sorted(file.name for file in path.iterdir())[:3]) or 'nothing'}"
    else:
        got = "an ONNX file" if path.suffix == ".onnx" else "a file of another kind"
    raise ValueError(
        f"{WHO}: the folder must hold a {INDEX}, got {path}, {got}; give what gs_algos.save, demo, compress, quantize, "
        "export or import wrote, a Transformers folder, a .pt2 package or a GGUF file"
    )


def _run(path: Path) -> str:
    """Describes the options of a run, and every network that it has saved so far."""
    lines = []
    for file, what in RUNS.items():
        if (path / file).is_file():
            options = ", ".join(f"{key}={value}" for key, value in read_json(path / file, WHO).items())
            lines.append(f"{path}: a folder of golden-stick {what}: {options:.400}")
    saved = sorted({file.parent for file in path.rglob(INDEX)})
    return "\n".join([*lines, *map(describe, saved)] if saved else [*lines, "no network is saved in it yet"])


def _language_model(folder: Folder) -> str:
    config, headers = folder.config, folder.headers(WHO)
    on_disk = sum(file.stat().st_size for file in folder.path.iterdir() if file.is_file())
    names = config.get("architectures")
    kind = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else config.get("model_type")
    head = (
        f"{folder.path}: a {kind}, {on_disk:,} bytes on disk, {len(headers)} tensors of {nbytes_of(headers.values()):,}"
    )
    settings = settings_of(folder, WHO)
    if settings is None:
        numbers = sum(math.prod(shape) for _, shape in headers.values())
        return f"{head}\nfloat, {numbers:,} numbers of {_kinds(headers)}; golden-stick quantize packs it"
    if settings.method != METHOD:
        options = ", ".join(f"{key}={value}" for key, value in _plain(settings.entries))
        return f"{head}\nquantized by another library, {options:.400}; golden-stick import makes a packed folder of it"
    packed = read_config(settings.entries, settings.where)
    parts = part_names(packed)
    floats = {name: facts for name, facts in headers.items() if name not in parts}
    asked = ((key, settings.entries.get(key)) for key in ("weights", "embeddings", "rules", "kv"))
    lines = [head, "packed by " + (", ".join(f"{key}={value}" for key, value in asked if value) or "golden-stick")]
    rows = [
        (name, "x".join(map(str, format.shape)), _scheme(format), f"{format.nbytes:,}")
        for name, format in packed.layers.items()
    ]
    rows += [(name, "", f"the weight of {owner}", "") for name, owner in packed.tied.items()]
    lines.append(render_layers(("layer", "shape", "weight", "bytes"), rows))
    nbytes = nbytes_of(floats.values())
    lines.append(f"float: {len(floats)} tensors of {_kinds(floats)}, {nbytes:,} bytes" if floats else "float: nothing")
    return "\n".join(lines)


def _scheme(format: PackedFormat) -> str:
    if format.scale_dtype in NAMES:
        return NAMES[format.scale_dtype]
    grain = "channel" if format.group_size == format.shape[1] else f"group:{format.group_size}"
    return f"int{format.bits}@{grain}{':asym' if format.zero is None else ''}"


def _kinds(headers: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(sorted({dtype for dtype, _ in headers.values()}))


def _plain(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the settings that are one value each, the method first."""
    yield "quant_method", entries.get("quant_method")
    for key, value in entries.items():
        if key != "quant_method" and isinstance(value, str | int | float) and value is not None:
            yield key, value


def _package(path: Path) -> str:
    accepts = read_package(path, WHO)
    shape = "x".join(["batch", *map(str, accepts.shape)])
    return f"{path}: a .pt2 package, {path.stat().st_size:,} bytes; takes {shape} {accepts.dtype} on {accepts.device}"


def _gguf(path: Path) -> str:
    model, header = gguf_skeleton(path)
    kinds = f"quantized as {', '.join(header.kinds)}" if header.kinds else "float"
    return f"{path}: a {type(model).__name__} in a GGUF file, {kinds}, {header.nbytes:,} bytes of tensors"
