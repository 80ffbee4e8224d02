"""Reads and writes compressed-tensors: `pack-quantized` integers, and `nvfp4-` and `mxfp4-pack-quantized` floats."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.llm.formats.base import Format, compiled, refuse_unknown, strings, take
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from gs_kernels.pack.formats.fp4 import KINDS, MXFP4, NVFP4, from_compressed_fp4, is_fp4, to_compressed_fp4

INTEGERS = "pack-quantized"
MIXED = "mixed-precision"  # formats that differ by group
PARTS = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "weight_global_scale",
)
FLOATS = {NVFP4: ("tensor_group", 16, "float8_e4m3fn"), MXFP4: ("group", 32, "uint8")}  # strategy, group, scales
USED = (
    "quant_method", "format", "quantization_status", "global_compression_ratio", "ignore", "config_groups", "version",
    "sparsity_config", "run_compressed",
)  # fmt: skip
WEIGHTS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "scale_dtype",
    "observer", "observer_kwargs", "zp_dtype",  # of how they were found
)  # fmt: skip
STATUSES = (None, "compressed", "frozen")


class CompressedTensorsWriter:
    """Writes a config group for every combination of bits and groups; a single one has all `Linear`."""

    def __init__(self, formats: Collection[PackedFormat] = ()) -> None:
        self.groups: list[tuple[dict[str, Any], str, list[str]]] = []

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        if is_fp4(weight):
            tensors, args, kind = to_compressed_fp4(weight, name)
        else:
            (tensors, args), kind = to_compressed_tensors(weight, name), INTEGERS
        for other, _, names in self.groups:
            if other == args:
                names.append(name)
                break
        else:
            self.groups.append((args, kind, [name]))
        return tensors

    def config(self, floats: list[str], head: str | None) -> dict[str, Any]:
        alone, kinds = len(self.groups) == 1, {kind for _, kind, _ in self.groups}
        every = ["Linear", *([] if head is None else [head])]  # vLLM's class of an output head has another name
        return {
            "quant_method": "compressed-tensors",
            "format": MIXED if len(kinds) > 1 else next(iter(kinds)),
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": floats,
            "config_groups": {
                f"group_{i}": {
                    "targets": every if alone else names,
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {**args, "dynamic": False, "actorder": None, "observer": "minmax"},
                    **({"format": kind} if len(kinds) > 1 else {}),
                }
                for i, (args, kind, names) in enumerate(self.groups)
            },
        }


@dataclass(frozen=True)
class Group:
    """Holds one config group: what its name, targets, format and weights say."""

    name: str
    targets: list[str]
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    order: str | None
    scale_dtype: str | None


class CompressedTensorsReader:
    """Finds the config group of a layer by its name, a pattern, or its class, in this order."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.layers: dict[str, nn.Module] = {}  # that `packs` was asked about
        refuse_unknown(config, USED, where)
        status = config.get("quantization_status")
        if status not in STATUSES:
            raise ValueError(f"{where}: quantization_status must be 'compressed', got {status!r}; compress the model")
        sparsity = config.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            raise ValueError(f"{where}: sparsity_config must be of format 'dense', got {sparsity!r:.80}")
        self.ignore = strings(config.get("ignore"), "ignore", where)
        groups = take(config, "config_groups", Mapping, where)
        self.groups = [self._group(name, group, config) for name, group in groups.items()]
        for text in (*self.ignore, *(target for group in self.groups for target in group.targets)):
            if text.startswith("re:"):
                compiled(text[3:], where)

    def _group(self, name: str, group: Any, config: Mapping[str, Any]) -> Group:
        if not isinstance(group, Mapping):
            raise ValueError(f"{self.where}: {name} must be an object, got {group!r:.40}; presets are not read")
        kind = group.get("format") or config.get("format")
        acts = "quantized" if group.get("input_activations") or group.get("output_activations") else "float"
        if kind not in (INTEGERS, *KINDS) or acts != "float":
            raise ValueError(
                f"{self.where}: {name} must have format {', '.join((INTEGERS, *KINDS))} and float activations, got "
                f"format {kind!r} and {acts} ones; load it with compressed-tensors"
            )
        refuse_unknown(group, ("targets", "weights", "format"), f"{self.where}: {name}")
        weights, where = take(group, "weights", Mapping, self.where), f"{self.where}: weights of {name}"
        refuse_unknown(weights, WEIGHTS, where)
        strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
        must: list[tuple[str, Any, tuple[Any, ...]]] = [("dynamic", weights.get("dynamic") or False, (False,))]
        if kind == INTEGERS:
            must += [("type", weights.get("type") or "int", ("int",))]
            must += [("strategy", strategy, ("tensor", "channel", "group"))]
        else:
            how, elements, scales = FLOATS[str(kind)]
            said = str(weights.get("scale_dtype") or scales).removeprefix("torch.")
            must += [("type", weights.get("type"), ("float",)), ("num_bits", weights.get("num_bits"), (4,))]
            must += [("strategy", strategy, (how,)), ("group_size", weights.get("group_size"), (elements,))]
            must += [("scale_dtype", said, (scales,)), ("symmetric", weights.get("symmetric", True), (True,))]
        for key, got, right in must:
            if got not in right:
                raise ValueError(f"{where}: {key} must be {' or '.join(map(str, right))}, got {got!r}")
        size, order = weights.get("group_size"), weights.get("actorder")
        return Group(
            name=name,
            targets=strings(take(group, "targets", list, self.where), "targets", self.where),
            kind=str(kind),
            bits=take(weights, "num_bits", int, self.where),
            symmetric=take(weights, "symmetric", bool, where, True),
            strategy=strategy,
            group_size=take(weights, "group_size", int, where) if strategy == "group" and size != -1 else None,
            order="group" if order is True else None if order in (None, False) else str(order),
            scale_dtype=weights.get("scale_dtype"),
        )

    def packs(self, name: str, layer: nn.Module, head: bool) -> tuple[bool, str] | None:
        self.layers[name] = layer
        ignored = next((entry for entry in self.ignore if _matches(entry, name, layer)), None)
        if ignored is not None:
            return False, f"{ignored} in ignore"
        found = self._find(name, layer)
        if found is None:
            return None
        return True, f"{found.name} with targets {', '.join(found.targets)}"[:120]

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        group = self._find(name, self.layers[name])
        if group is None:
            named = ", ".join(target for group in self.groups for target in group.targets)
            raise ValueError(f"{self.where}: a config group must name {name}, got {named}")
        if group.kind in KINDS:
            return self._floats(name, group, tensors)
        g_idx = tensors.get("weight_g_idx")
        rest = {part: tensor for part, tensor in tensors.items() if part != "weight_g_idx"}
        zero = rest.get("weight_zero_point")
        if not group.symmetric and zero is None:
            raise ValueError(f"{self.where}: {name} must have a weight_zero_point as {group.name} says, got none")
        weight = from_compressed_tensors(rest, bits=group.bits, name=name)
        middle, k = 2 ** (group.bits - 1), weight.shape[1]
        if group.symmetric and (isinstance(weight.zero, Tensor) or weight.zero != middle):
            raise ValueError(f"{self.where}: zero points of {name} must be {middle} as {group.name} says, got others")
        size = group.group_size if group.strategy == "group" and group.group_size else k
        one = tensors["weight_scale"].numel() == 1
        if weight.group_size != size or (one and group.strategy != "tensor" and weight.shape[0] > 1):
            raise ValueError(
                f"{self.where}: {name} must have a scale for every {size} inputs as {group.name} says, "
                f"got weight_scale {list(tensors['weight_scale'].shape)}"
            )
        dtype = str(weight.scale.dtype).removeprefix("torch.")
        if group.scale_dtype and str(group.scale_dtype).removeprefix("torch.") != dtype:
            raise ValueError(f"{self.where}: scales of {name} must be {group.scale_dtype} as said, got {dtype}")
        plain = torch.arange(k) // weight.group_size
        sorted_already = g_idx is not None and (bool((g_idx == -1).all()) or torch.equal(g_idx.long(), plain))
        if (g_idx is None and group.order in ("group", "dynamic")) or (g_idx is not None and not sorted_already):
            raise ValueError(
                f"{self.where}: {name} must have its groups in order, got actorder {group.order!r} and "
                f"{'a' if g_idx is not None else 'no'} weight_g_idx; quantize with actorder 'static' or none"
            )
        return weight

    def _floats(self, name: str, group: Group, tensors: Mapping[str, Tensor]) -> PackedWeight:
        divided = "weight_global_scale" in tensors
        if divided != (group.kind == NVFP4):
            raise ValueError(
                f"{self.where}: {name} must have {'a' if group.kind == NVFP4 else 'no'} weight_global_scale as "
                f"{group.kind} of {group.name} has, got {'one' if divided else 'none'}"
            )
        return from_compressed_fp4(tensors, name=name)

    def _find(self, name: str, layer: nn.Module) -> Group | None:
        """Returns the group of a layer; groups that have its name come before patterns, and these before classes.

        Raises:
            ValueError: if two groups say different things of it.
        """
        for kind in (_is_name, _is_pattern, _is_class):
            groups = [group for group in self.groups if any(kind(target, name, layer) for target in group.targets)]
            if any(replace(group, name="", targets=[]) != replace(groups[0], name="", targets=[]) for group in groups):
                raise ValueError(
                    f"{self.where}: {name} must be in one config group, got {groups[0].name} and {groups[1].name}"
                )
            if groups:
                return groups[0]
        return None


def _matches(target: str, name: str, layer: nn.Module) -> bool:
    return any(kind(target, name, layer) for kind in (_is_name, _is_pattern, _is_class))


def _is_name(target: str, name: str, layer: nn.Module) -> bool:
    return target == name


def _is_pattern(target: str, name: str, layer: nn.Module) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _is_class(target: str, name: str, layer: nn.Module) -> bool:
    return target in {kind.__name__ for kind in type(layer).__mro__}


FORMAT = Format("compressed-tensors", "weight_packed", PARTS, True, CompressedTensorsWriter, CompressedTensorsReader)
