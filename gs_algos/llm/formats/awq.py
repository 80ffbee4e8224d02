"""Reads and writes AWQ checkpoints of 4 bits in the GEMM version."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from gs_algos.llm.formats.base import NOTES, Format, refuse_unknown, strings, take
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.awq import BITS, from_awq, to_awq

PARTS = ("qweight", "qzeros", "scales")
USED = (
    "quant_method",
    "bits",
    "group_size",
    "version",
    "format",
    "checkpoint_format",
    "zero_point",
    "sym",
    "modules_to_not_convert",
)


class AwqWriter:
    """Writes layers that all have one group size, as AWQ asks."""

    def __init__(self, formats: Collection[PackedFormat] = ()) -> None:
        self.groups: dict[int, str] = {}

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        whole = weight.group_size == weight.shape[1]
        self.groups.setdefault(-1 if whole else weight.group_size, name)
        if len(self.groups) > 1:
            (size, first), (other, _) = self.groups.items()
            raise ValueError(
                f"to_awq: all layers must have one group size, got {size} in {first} and {other} in {name}; "
                "export to compressed-tensors, or quantize anew"
            )
        return to_awq(weight, name=name)

    def config(self, floats: list[str], head: str | None) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": next(iter(self.groups)),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": floats or None,
        }


class AwqReader:
    """Reads 4 bits in the GEMM version, with or without the names that AutoAWQ first gave the settings."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        bits = config.get("bits", BITS)
        kinds = {str(config[key]).lower() for key in ("version", "format", "checkpoint_format") if config.get(key)}
        version = next((kind for kind in sorted(kinds) if kind != "gemm"), "gemm")
        if config.get("backend") == "llm-awq":
            version = "llm-awq"
        if bits != BITS or version != "gemm":
            raise ValueError(f"{where}: must be of {BITS} bits and version 'gemm', got {bits!r} and {version!r}")
        refuse_unknown(config, (*USED, *NOTES), where)
        self.where, self.group_size = where, take(config, "group_size", int, where)
        self.floats = strings(config.get("modules_to_not_convert"), "modules_to_not_convert", where)
        # `sym` says nothing here: Transformers writes true beside zero points
        self.symmetric = not take(config, "zero_point", bool, where, True)

    def packs(self, name: str, layer: nn.Module, head: bool) -> tuple[bool, str] | None:
        for entry in self.floats:
            if f".{entry}." in f".{name}.":
                return False, f"{entry} in modules_to_not_convert"
        return None

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        weight = from_awq(tensors, name=name)
        size = weight.shape[1] if self.group_size in (-1, 0) else self.group_size
        if weight.group_size != size:
            raise ValueError(
                f"{self.where}: {name} must have groups of {size} as group_size says, got {weight.group_size}"
            )
        middle = 2 ** (BITS - 1)
        if self.symmetric and (isinstance(weight.zero, Tensor) or weight.zero != middle):
            raise ValueError(f"{self.where}: zero points of {name} must be {middle} without zero_point, got others")
        return weight


FORMAT = Format("awq", "qweight", PARTS, False, AwqWriter, AwqReader)
