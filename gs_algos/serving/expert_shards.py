"""Computes which part of the packed stacks of a mixture one process of an engine holds, and cuts their tensors to it.

Expert parallelism gives a process some experts whole. Tensor parallelism gives it a part of the inner features of every
expert: rows of the stack that computes them, in which gate lies in front of up, and columns of the one that reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from gs_algos.quant.packed.module import PackedFormat
from gs_algos.serving.shards import WHO, shard

STACK = re.compile(r"^(.*\.experts)\.(gate_up_proj|up_proj|down_proj)$")
DOWN = "down_proj"
WHOLE = "use --enable-expert-parallel, which cuts no expert"


@dataclass(frozen=True)
class Place:
    """Says what a process holds: the experts `own` of them all, and of these one of some equal parts."""

    experts: int
    own: tuple[int, ...]
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class ExpertShard:
    """Holds the part of one stack `[E * N, K]` that a process has.

    Args:
        name: of the stack in the checkpoint.
        whole: its format there.
        blocks: of rows in each expert, each of which is cut (gate and up); 0 cuts columns.
    """

    name: str
    whole: PackedFormat
    place: Place
    blocks: int

    @cached_property
    def format(self) -> PackedFormat:
        """Returns the format of the part.

        Raises:
            ValueError: if rows do not divide among experts, or they or columns among parts, or the cut goes through a
                group, or through a byte of codes.
        """
        n, k = self.whole.shape
        parts = self.place.experts * (self.blocks * self.place.parts or 1)
        if n % parts:
            cut = f", {self.blocks} blocks of each and {self.place.parts} parts of those" if self.blocks else ""
            raise ValueError(
                f"{WHO}: the {n} rows of {self.name} must divide among {self.place.experts} experts{cut}, got a rest of"
                f" {n % parts}; use another tensor_parallel_size, or {WHOLE}"
            )
        rows = n // self.place.experts * len(self.place.own)
        if self.blocks:
            return replace(self.whole, shape=(rows // self.place.parts, k))
        return _columns(self.whole, self.name, rows, self.place.parts)

    def cut(self, part: str, tensor: Tensor) -> Tensor:
        """Cuts one tensor of the stack, `codes`, `scale`, `zero` or `levels`, to what the process holds."""
        if part == "levels":
            return tensor
        place = self.place
        each = tensor.unflatten(0, (place.experts, -1))
        if len(place.own) < place.experts:
            each = each[list(place.own)]
        if self.blocks:
            return each.unflatten(1, (self.blocks, place.parts, -1))[:, :, place.part].flatten(0, 2)
        per_row = part != "codes" and tensor.shape[1] == 1  # which every part along K needs
        return (each if per_row else each.chunk(place.parts, 2)[place.part]).flatten(0, 1)


def _columns(format: PackedFormat, name: str, rows: int, parts: int) -> PackedFormat:
    k = format.shape[1]
    if k % parts:
        raise ValueError(
            f"{WHO}: the {k} inner features of {name} must divide among tensor_parallel_size, got {parts}; {WHOLE}"
        )
    try:
        return shard(format, name, rows, k // parts)
    except ValueError as error:
        raise ValueError(f"{error}, or {WHOLE}") from None


def check_cuts(layers: Mapping[str, PackedFormat], parts: int) -> None:
    """Raises if tensor parallelism cannot cut the experts of a model.

    Raises:
        ValueError: so.
    """
    for name, format in layers.items():
        match = STACK.match(name)
        if match is not None and match[2] == DOWN:
            _columns(format, name, format.shape[0], parts)


def experts_at(layers: Mapping[str, PackedFormat], prefix: str) -> tuple[str, dict[str, PackedFormat]]:
    """Finds the stacks of a mixture: the name in the checkpoint of the module that has them, and their formats.

    Args:
        prefix: the name that the engine has for the module, in which that of the mixture may differ:
            `model.layers.0.block_sparse_moe.experts` for `model.layers.0.mlp.experts`.
    """
    found: dict[str, dict[str, PackedFormat]] = {}
    for name, format in layers.items():
        match = STACK.match(name)
        if match is not None and match[1].rsplit(".", 2)[0] == prefix.rsplit(".", 2)[0]:
            found.setdefault(match[1], {})[match[2]] = format
    if prefix in found:
        return prefix, found[prefix]
    if len(found) > 1:
        raise ValueError(f"{WHO}: one module must have the experts of {prefix}, got {', '.join(found)}")
    return next(iter(found.items()), (prefix, {}))


def expert_shards(
    owner: str, stacks: Mapping[str, PackedFormat], place: Place, *, hidden: int, inner: int
) -> tuple[ExpertShard, ExpertShard]:
    """Returns the parts that a process holds of gate and up, in one stack, and of down.

    Args:
        owner: the module that has the stacks.
        hidden: features of a token.
        inner: of an expert, in all processes.

    Raises:
        ValueError: if a stack is missing, or of other sizes than the model says, or the process gets nothing.
    """
    sizes = {"gate_up_proj": (2 * inner, hidden), DOWN: (hidden, inner)}
    if stacks.keys() != sizes.keys():
        raise ValueError(
            f"{WHO}: experts must be packed in gate_up_proj and {DOWN}, got only {', '.join(stacks)} of {owner}; "
            "quantize both under one rule, or serve the folder with Transformers"
        )
    if not place.own:
        raise ValueError(
            f"{WHO}: every process must hold an expert, got {place.experts} of {owner} for more processes; use fewer"
        )
    for part, (rows, columns) in sizes.items():
        if stacks[part].shape != (place.experts * rows, columns):
            raise ValueError(
                f"{WHO}: {owner}.{part} must be [{place.experts} * {rows}, {columns}] as the model's sizes say, got "
                f"{list(stacks[part].shape)} in quantization_config; config.json is damaged, or of another model"
            )
    first, down = (ExpertShard(f"{owner}.{part}", stacks[part], place, 2 if part != DOWN else 0) for part in sizes)
    return first, down
