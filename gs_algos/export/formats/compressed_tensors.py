"""compressed-tensors `pack-quantized`, as llm-compressor writes it and vLLM and Transformers read it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gs_algos.export.formats.base import Format, take
from gs_algos.quant.packed import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.compressed_tensors import from_compressed_tensors, to_compressed_tensors

KIND = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


class CompressedTensorsWriter:
    """A config group for every combination of bits and groups; of a single one, all `Linear` are."""

    def __init__(self, formats: Collection[PackedFormat] = ()) -> None:
        self.groups: list[tuple[dict[str, Any], list[str]]] = []

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        tensors, args = to_compressed_tensors(weight, name)
        for other, names in self.groups:
            if other == args:
                names.append(name)
                break
        else:
            self.groups.append((args, [name]))
        return tensors

    def config(self, floats: list[str]) -> dict[str, Any]:
        alone = len(self.groups) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": KIND,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": floats,
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if alone else names,
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {**args, "dynamic": False, "actorder": None, "observer": "minmax"},
                }
                for i, (args, names) in enumerate(self.groups)
            },
        }


class CompressedTensorsReader:
    """Finds the config group of a layer by its name, a pattern, or the class `Linear`, in this order."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        groups = take(config, "config_groups", Mapping, where)
        self.targets: dict[str, int] = {}
        for name, group in groups.items():
            kind = group.get("format") or config.get("format")
            if kind != KIND or group.get("input_activations") or group.get("output_activations"):
                raise ValueError(
                    f"{where}: {name} must have format {KIND!r} and float activations, got format {kind!r}; "
                    "load it with compressed-tensors"
                )
            bits = take(take(group, "weights", Mapping, where), "num_bits", int, where)
            self.targets |= dict.fromkeys(take(group, "targets", list, where), bits)

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        return from_compressed_tensors(tensors, bits=self._bits(name), name=name)

    def _bits(self, name: str) -> int:
        if name in self.targets:
            return self.targets[name]
        for target, bits in self.targets.items():
            if target.startswith("re:") and re.match(target[3:], name):
                return bits
        if "Linear" not in self.targets:
            raise ValueError(f"{self.where}: a config group must name {name}, got {', '.join(self.targets)}")
        return self.targets["Linear"]


FORMAT = Format("compressed-tensors", "weight_packed", PARTS, True, CompressedTensorsWriter, CompressedTensorsReader)
