"""AWQ checkpoints of 4 bits in the GEMM version."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gs_algos.export.formats.base import Format
from gs_algos.quant.packed import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.awq import BITS, from_awq, to_awq

PARTS = ("qweight", "qzeros", "scales")


class AwqWriter:
    """AWQ has one group size for all layers."""

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

    def config(self, floats: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": next(iter(self.groups)),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": floats or None,
        }


class AwqReader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        bits, version = config.get("bits", BITS), str(config.get("version", "gemm")).lower()
        if bits != BITS or version != "gemm":
            raise ValueError(f"{where}: must be of {BITS} bits and version 'gemm', got {bits!r} and {version!r}")

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        return from_awq(tensors, name=name)


FORMAT = Format("awq", "qweight", PARTS, False, AwqWriter, AwqReader)
