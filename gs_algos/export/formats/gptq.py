"""GPTQ checkpoints, as GPTQModel writes them: one width and group for most layers, others under `dynamic`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gs_algos.export.formats.base import Format, take
from gs_algos.quant.packed import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.gptq import from_gptq, to_gptq

PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}


class GptqWriter:
    """Version 2, which can say a zero point of 0, where zero points differ; else version 1, which all readers know."""

    def __init__(self, formats: Collection[PackedFormat]) -> None:
        self.version = 1 if all(f.zero is not None and f.zero >= 1 for f in formats) else 2
        self.layers: dict[str, tuple[int, int]] = {}  # bits and group, -1 for a whole row
        self.symmetric = True

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        tensors = to_gptq(weight, version=self.version, name=name)
        self.layers[name] = (weight.bits, -1 if weight.group_size == weight.shape[1] else weight.group_size)
        self.symmetric &= not isinstance(weight.zero, Tensor) and weight.zero == 2 ** (weight.bits - 1)
        return tensors

    def config(self, floats: list[str]) -> dict[str, Any]:
        (bits, group_size), _ = Counter(self.layers.values()).most_common(1)[0]
        dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in floats}
        for name, (own, group) in self.layers.items():
            if (own, group) != (bits, group_size):
                dynamic[f"+:^{re.escape(name)}$"] = {"bits": own, "group_size": group}
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": self.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


class GptqReader:
    """Reads both versions; act-order is refused, since our layers take their inputs in order."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.bits, self.group_size = (take(config, key, int, where) for key in ("bits", "group_size"))
        kind = config.get("checkpoint_format") or "gptq"
        if kind not in VERSIONS:
            raise ValueError(f"{where}: checkpoint_format must be one of {', '.join(VERSIONS)}, got {kind!r}")
        self.version, self.where = VERSIONS[kind], where
        self.dynamic = config.get("dynamic") or {}

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        own: Mapping[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        for pattern, options in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                own = {**own, **options}
        weight, order = from_gptq(
            tensors, **{k: own[k] for k in ("bits", "group_size")}, version=self.version, name=name
        )
        if order is not None:
            raise ValueError(
                f"{self.where}: {name} must have its groups in order, got a g_idx that reorders them (desc_act); "
                "quantize with desc_act=False"
            )
        return weight


FORMAT = Format("gptq", "qweight", PARTS, False, GptqWriter, GptqReader)
