"""Reads how another library quantized a folder: from config.json, or from a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gs_algos.llm.folder import Folder, entries, read_json
from gs_algos.llm.formats.base import NOTES

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # file -> the method of who writes it
ENTRY, OLD_ENTRY = "quantization_config", "compression_config"  # of config.json; the latter by older llm-compressor
ALIASES = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class Settings:
    """Holds how a folder was quantized. where: the file, or files, that the entries are from."""

    method: Any
    entries: dict[str, Any]
    where: str


def settings_of(folder: Folder, who: str) -> Settings | None:
    """Reads the quantization settings in config.json and the files beside it, which must agree; None if there are none.

    Raises:
        ValueError: if they contradict each other, are damaged, or only a part of the model is quantized.
    """
    path = folder.path / "config.json"
    places: list[tuple[str, Path, dict[str, Any]]] = []
    for key in (ENTRY, OLD_ENTRY):
        value = folder.config.get(key)
        if value is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{who}: {key} in {path} must be an object, got {value!r:.80}; it is damaged")
            places.append((key, path, value if key == ENTRY else {"quant_method": "compressed-tensors", **value}))
    for file, method in BESIDE.items():
        if (folder.path / file).is_file():
            places.append((file, folder.path / file, {"quant_method": method, **read_json(folder.path / file, who)}))
    if not places:
        inside = next((key for key, value in entries(folder.config) if key in (ENTRY, OLD_ENTRY) and value), None)
        if inside is not None:
            raise ValueError(
                f"{who}: {path} must have its {inside} at the top, got it for a part of the model; "
                "load the model with the library that wrote it"
            )
        return None
    merged: dict[str, Any] = {}
    first, first_path, _ = places[0]
    for name, place, value in places:
        plain = {ALIASES.get(key, key): entry for key, entry in value.items()}
        for key in plain.keys() & merged.keys() - {*NOTES}:
            if _text(plain[key]) != _text(merged[key]):
                raise ValueError(
                    f"{who}: {key} must be the same in {first} of {first_path} and in {place}, "
                    f"got {merged[key]!r:.40} and {plain[key]!r:.40} in {name}; delete what is wrong"
                )
        merged = {**plain, **merged}
    where = " and ".join(str(file) for file in dict.fromkeys(file for _, file, _ in places))
    return Settings(merged.get("quant_method"), merged, f"{who}: {where}")


def _text(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value
