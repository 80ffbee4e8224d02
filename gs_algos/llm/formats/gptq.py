"""Reads and writes GPTQ checkpoints, as GPTQModel does: one width and group for most layers, others under `dynamic`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.llm.formats.base import NOTES, Format, compiled, refuse_unknown, strings, take
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.gptq import from_gptq, to_gptq
from gs_kernels.pack.formats.words import unpack_words

PARTS = ("qweight", "qzeros", "scales", "g_idx")
USED = (
    "quant_method", "method", "bits", "group_size", "checkpoint_format", "format", "sym", "desc_act", "static_groups",
    "lm_head", "dynamic", "pack_dtype", "data_type", "modules_in_block_to_quantize",
)  # fmt: skip
OVERRIDES = ("bits", "group_size", "sym", "desc_act", "static_groups", *NOTES)
VERSIONS = {"gptq": 1, "gptq_v2": 2}


class GptqWriter:
    """Writes version 2, which can hold a zero point of 0, where zero points differ; else 1, which all readers know."""

    def __init__(self, formats: Collection[PackedFormat]) -> None:
        self.version = 1 if all(f.zero is not None and f.zero >= 1 for f in formats) else 2
        self.layers: dict[str, tuple[int, int]] = {}  # bits and group, -1 for a whole row
        self.symmetric = True

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        tensors = to_gptq(weight, version=self.version, name=name)
        self.layers[name] = (weight.bits, -1 if weight.group_size == weight.shape[1] else weight.group_size)
        self.symmetric &= not isinstance(weight.zero, Tensor) and weight.zero == 2 ** (weight.bits - 1)
        return tensors

    def config(self, floats: list[str], head: str | None) -> dict[str, Any]:
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
            "lm_head": head is not None,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


class GptqReader:
    """Reads both versions; act-order is refused, since our layers take their inputs in order.

    Packers disagree about what they call version 1. Where `sym` says what the zero points are, their values tell which
    one was stored; else `checkpoint_format` does.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where, self.own = where, dict(config)
        for key in ("bits", "group_size"):
            take(config, key, int, where)
        kinds = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
        kind = next(iter(kinds), "gptq")
        if kind not in VERSIONS or len(kinds) > 1:
            got = " and ".join(sorted(kinds))
            raise ValueError(f"{where}: checkpoint_format must be one of {', '.join(VERSIONS)}, got {got!r}")
        self.version = VERSIONS[kind]
        self._check(config, (*USED, *NOTES), where)
        for key, right in (("pack_dtype", "int32"), ("data_type", "int")):
            if str(config.get(key) or right).removeprefix("torch.") != right:
                raise ValueError(f"{where}: {key} must be {right!r}, got {config[key]!r}; load it with GPTQModel")
        dynamic = take(config, "dynamic", Mapping, where, {})
        self.dynamic = []
        for pattern, options in dynamic.items():
            if not isinstance(options, Mapping):
                raise ValueError(f"{where}: dynamic {pattern} must be an object, got {options!r:.40}; it is damaged")
            self._check(options, OVERRIDES, f"{where}: dynamic {pattern}")
            found = compiled(pattern.removeprefix("-:").removeprefix("+:"), where)
            self.dynamic.append((pattern, found, options))
        inside = config.get("modules_in_block_to_quantize")
        flat = [name for part in inside for name in (part if isinstance(part, list) else [part])] if inside else []
        self.inside = strings(flat, "modules_in_block_to_quantize", where) if isinstance(inside, list) else []

    @staticmethod
    def _check(options: Mapping[str, Any], known: Collection[str], where: str) -> None:
        refuse_unknown(options, known, where)
        for key in ("sym", "desc_act", "static_groups", "lm_head"):
            take(options, key, bool, where, False)

    def packs(self, name: str, layer: nn.Module, head: bool) -> tuple[bool, str] | None:
        for pattern, found, _ in self.dynamic:
            if found.match(name):
                if pattern.startswith("-:"):
                    return False, f"dynamic {pattern}"
                break  # how it is packed, if it is
        if head and self.own.get("lm_head") is not None:
            return self.own["lm_head"], f"lm_head {self.own['lm_head']}"
        if self.inside and not head:
            listed = any(f".{name}".endswith(f".{entry}") for entry in self.inside)
            return listed, "modules_in_block_to_quantize"
        return None

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        own = self.own
        for pattern, found, options in self.dynamic:  # the first that matches counts
            if found.match(name):
                own = {**own, **({} if pattern.startswith("-:") else options)}
                break
        bits, group_size = (take(own, key, int, f"{self.where}: {name}") for key in ("bits", "group_size"))
        if own.get("desc_act") and "g_idx" not in tensors:
            raise ValueError(f"{self.where}: {name} must have a g_idx as desc_act says, got none; the order is lost")
        version = self._version(name, own, bits, tensors)
        weight, order = from_gptq(tensors, bits=bits, group_size=group_size, version=version, name=name)
        middle = 2 ** (bits - 1)
        if own.get("sym") and (isinstance(weight.zero, Tensor) or weight.zero != middle):
            raise ValueError(
                f"{self.where}: zero points of {name} must be {middle} as sym says, got others; "
                "the file is damaged, or sym must be false"
            )
        if order is not None:
            raise ValueError(
                f"{self.where}: {name} must have its groups in order, got a g_idx that reorders them (desc_act); "
                "quantize with desc_act=False"
            )
        return weight

    def _version(self, name: str, own: Mapping[str, Any], bits: int, tensors: Mapping[str, Tensor]) -> int:
        """Finds which version the zero points of a layer are stored in.

        Raises:
            ValueError: if neither `sym` nor they say.
        """
        words = tensors.get("qzeros")
        if bits not in (2, 4, 8) or words is None or words.dim() != 2 or words.dtype != torch.int32:
            return self.version  # which from_gptq refuses by name
        zeros = unpack_words(words, bits, words.shape[1] * 32 // bits)
        middle = 2 ** (bits - 1)
        stored = {1: bool((zeros == middle - 1).all()), 2: bool((zeros == middle).all())}
        if own.get("sym"):
            return next((version for version, right in stored.items() if right), self.version)
        if own.get("sym") is None and stored[3 - self.version]:
            raise ValueError(
                f"{self.where}: sym must say whether zero points are {middle}, got no sym and zero points of {name} "
                f"as version {3 - self.version} stores them; add sym"
            )
        return self.version


FORMAT = Format("gptq", "qweight", PARTS, False, GptqWriter, GptqReader)
