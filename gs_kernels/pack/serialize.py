"""Turns a packed weight into plain tensors and a dictionary for JSON, and back, exactly. README.md has the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.checks import SCALES_8, check_layout, check_packed, check_packed_values
from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import repack

FORMAT = "golden-stick-packed"
VERSION = 2  # of weights whose scales have 8 bits; others are of version 1
_PARTS = {"codes", "scale", "zero", "levels", "divisor"}
_KEYS = {"format", "version", "bits", "shape", "group_size", "zero"}


def stored_scale(scale: Tensor) -> Tensor:
    """Views scales as files keep them: powers of two as bytes, for which safetensors has no other dtype in PyTorch."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def loaded_scale(scale: Tensor) -> Tensor:
    """Undoes `stored_scale`."""
    return scale.view(torch.float8_e8m0fnu) if isinstance(scale, Tensor) and scale.dtype == torch.uint8 else scale


def to_tensors(weight: PackedWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors `codes`, `scale`, and if it has them `zero`, `levels`, `divisor`; and what JSON must keep.

    Codes are canonical whatever the layout of the weight; tensors that need no repacking are not copied.
    """
    check_packed("to_tensors", weight)
    weight = repack(weight, CANONICAL)
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "levels", "divisor")}
    tensors["scale"] = stored_scale(weight.scale)
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION if weight.scale.dtype in SCALES_8 else 1,
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
        tensors: `codes`, `scale`, and perhaps `zero`, `levels`, `divisor`; nothing else.
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
    if not {"codes", "scale"} <= set(tensors) <= _PARTS:
        raise ValueError(
            f"{who}: tensors of {name} must be codes, scale and at most zero, levels and divisor, "
            f"got {_listed(set(tensors))}"
        )
    zero = tensors["zero"] if "zero" in tensors else _number(who, metadata, "zero", (int, float), name)
    shape = metadata["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(type(n) is int for n in shape):
        raise ValueError(f"{who}: shape of {name} must be two integers, got {shape!r}")
    weight = PackedWeight(
        codes=tensors["codes"],
        scale=loaded_scale(tensors["scale"]),
        zero=zero,
        levels=tensors.get("levels"),
        bits=_number(who, metadata, "bits", (int,), name),
        shape=(shape[0], shape[1]),
        group_size=_number(who, metadata, "group_size", (int,), name),
        divisor=tensors.get("divisor"),
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
