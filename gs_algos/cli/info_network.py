"""Describes a saved network from its JSON and the header of its tensor file; no model is built."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gs_algos.core.checkpoint import INDEX, read_checkpoint
from gs_algos.core.plan import render_layers

BYTES = {"I8": 1, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


def describe(folder: str | os.PathLike[str]) -> str:
    """Returns a text: size, the algorithms in the order they were applied with their options, and one line per layer.

    Raises:
        ValueError: if the folder is no checkpoint, or is damaged.
    """
    index, tensors = read_checkpoint(folder, lambda where, facts: _tensors(where / facts["tensors"]["file"]))
    on_disk = (Path(folder) / INDEX).stat().st_size + index["tensors"]["nbytes"]
    stored = sum(math.prod(shape) for shape, _ in tensors.values())
    lines = [
        f"{folder}: {index['format']} version {index['version']}, {on_disk:,} bytes on disk, {stored:,} stored numbers"
    ]
    for step, entry in enumerate(index["history"], 1):
        options = ", ".join(f"{key}={value}" for key, value in entry["config"].items())
        lines += [f"{step}. {entry['algorithm']}, {entry['stage']} after {entry['steps']:,} steps: {options}"]
        lines += [
            render_layers(("layer", "kind", "shape", "weight", "activation", "bytes"), _layers(entry["plan"], tensors))
        ]
    return "\n".join(lines)


def _layers(plan: list[dict[str, Any]], tensors: dict[str, tuple[tuple[int, ...], int]]) -> list[tuple[Any, ...]]:
    """Returns one row per planned site; bytes are those of every tensor stored under the layer's name."""
    rows = []
    for row in plan:
        site, settings = row["site"], row["settings"] or {}
        own = {key: facts for key, facts in tensors.items() if key == site or key.startswith(f"{site}.")}
        shape = (
            settings.get("shape")
            or (settings.get("format") or {}).get("shape")
            or own.get(f"{site}.weight", own.get(site, ((),)))[0]
        )
        nbytes = sum(math.prod(facts[0]) * facts[1] for facts in own.values())
        kept = f"float: {row['reason']}" if row["action"] == "keep" else ""
        weight, act = settings.get("weight") or kept, settings.get("act") or ""
        rows.append((site, row["kind"], "x".join(map(str, shape)), weight, act, f"{nbytes:,}" if nbytes else ""))
    return rows


def _tensors(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Reads (shape, bytes per number) of every stored tensor."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (tuple(s.get_shape()), BYTES.get(s.get_dtype(), 1)) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"info: {path} must be a whole safetensors file, got {error}; the checkpoint is damaged"
        ) from error
