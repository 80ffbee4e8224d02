"""Turns a packed weight into plain tensors and a dictionary for JSON, and back, exactly. README.md has the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gs_kernels.pack.checks import check_layout, check_packed, check_packed_values
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import repack

FORMAT = "golden-stick-packed"
VERSION = 1
_KEYS = {"format", "version", "bits", "shape", "group_size", "zero"}


def to_tensors(weight: PackedWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors `codes`, `scale`, and if it has them `zero` and `levels`; and what JSON must keep.

    Codes are canonical whatever the layout of the weight; tensors that need no repacking are not copied.
    """
    check_packed("to_tensors", weight)
    weight = repack(weight, CANONICAL)
    tensors = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "levels": weight.levels}
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "bits": weight.bits,
        "shape": list(weight.shape),
        "group_size": weight.group_size,
    }
    if not isinstance(weight.zero, Tensor):
        metadata["zero"] = float(weight.zero)
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}, metadata


def from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], layout: str = CANONICAL, name: str = "weight"
) -> PackedWeight:
    """Makes the weight that `to_tensors` described. Everything is checked, values too.

    Args:
        tensors: `codes`, `scale`, and perhaps `zero`, `levels`; nothing else.
        metadata: as JSON gives it back.
        layout: of the result.
        name: of the weight in error messages.

    Raises:
        TypeError, ValueError: if a part is missing, damaged or unknown, or the version is newer than this library's.
    """
    who = "from_tensors"
    check_layout(who, layout)
    _check_version(who, metadata, name)
    wanted = _KEYS - {"zero"} if "zero" in tensors else _KEYS
    if set(metadata) != wanted:
        raise ValueError(f"{who}: metadata of {name} must have {_listed(wanted)}, got {_listed(set(metadata))}")
    names = {"codes", "scale", "zero", "levels"}
    if not {"codes", "scale"} <= set(tensors) <= names:
        raise ValueError(
            f"{who}: tensors of {name} must be codes, scale and at most zero and levels, got {_listed(set(tensors))}"
        )
    zero = tensors["zero"] if "zero" in tensors else _number(who, metadata, "zero", (int, float), name)
    shape = metadata["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(type(n) is int for n in shape):
        raise ValueError(f"{who}: shape of {name} must be two integers, got {shape!r}")
    weight = PackedWeight(
        codes=tensors["codes"],
        scale=tensors["scale"],
        zero=zero,
        levels=tensors.get("levels"),
        bits=_number(who, metadata, "bits", (int,), name),
        shape=(shape[0], shape[1]),
        group_size=_number(who, metadata, "group_size", (int,), name),
    )
    check_packed(who, weight, name)
    check_packed_values(who, weight, name)
    return repack(weight, layout)


def _check_version(who: str, metadata: Mapping[str, Any], name: str) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{who}: format of {name} must be {FORMAT!r}, got {metadata.get('format')!r}")
    version = _number(who, metadata, "version", (int,), name)
    if version > VERSION:
        raise ValueError(
            f"{who}: version of {name} must be at most {VERSION}, got {version}; a newer golden-stick wrote it: upgrade"
        )
    if version < 1:
        raise ValueError(f"{who}: version of {name} must be at least 1, got {version}")


def _number(who: str, metadata: Mapping[str, Any], key: str, kinds: tuple[type, ...], name: str) -> Any:
    value = metadata.get(key)
    if type(value) not in kinds:
        raise ValueError(f"{who}: {key} of {name} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    return value


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"
