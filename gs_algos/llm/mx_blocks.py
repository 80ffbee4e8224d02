"""Reads and writes folders whose experts are MX blocks of 4-bit floats, `quant_method: mxfp4`, as those of gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gs_algos.llm.folder import Folder, ShardWriter, opened_all
from gs_algos.llm.foreign_config import Settings
from gs_algos.llm.formats.base import refuse_unknown
from gs_algos.llm.skeleton import check_ties, fit, skeleton, stacks_in
from gs_algos.quant.packed.experts import ExpertStack
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.packed.packable import matrix_of
from gs_kernels import PackedWeight
from gs_kernels.pack.formats.fp4 import BLOCK, from_mx_blocks, to_mx_blocks
from gs_kernels.pack.serialize import to_tensors

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"  # behind the name of a stack of experts
KIND = "GptOssExperts"  # the only ones that Transformers and vLLM read in this form
FLOATS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as gpt-oss says
USED = ("quant_method", "modules_to_not_convert", "dequantize")


def read_mx_blocks(
    folder: Folder, settings: Settings, out: Path, shard_bytes: int, who: str
) -> tuple[ShardWriter, dict[str, PackedFormat]]:
    """Writes the tensors of such a folder, packed, into a new one; returns what wrote them, and the formats of stacks.

    Raises:
        ValueError: if tensors are missing or one too many, do not fit the model, or a scale is NaN.
    """
    refuse_unknown(settings.entries, USED, settings.where)
    model = skeleton(folder.path, who)
    stacks = stacks_in(model)
    packed = [name.removesuffix(BLOCKS) for name in folder.tensors if name.endswith(BLOCKS)]
    for name in packed:
        if name not in stacks:
            raise ValueError(
                f"{who}: {name} must be a stack of experts of a {type(model).__name__}, got {name}{BLOCKS}"
            )
        if f"{name}{SCALES}" not in folder.tensors:
            raise ValueError(f"{who}: {folder.path} must hold {name}{SCALES} beside its blocks, got no such tensor")
    if not packed:
        raise ValueError(f"{who}: {folder.path} must hold experts as MX blocks, got no tensor that ends in {BLOCKS}")
    parts = {f"{name}{part}" for name in packed for part in (BLOCKS, SCALES)}
    plain = {name: facts for name, facts in folder.headers(who).items() if name not in parts}
    fit(model, plain, packed).refuse(who, folder.path, model)
    formats: dict[str, PackedFormat] = {}
    shards = ShardWriter(out, shard_bytes)
    with opened_all(folder, who) as get:
        check_ties(model, folder, get, who)
        for name in folder.tensors:
            if name not in parts:
                shards.add(name, get(name))
            elif name.endswith(BLOCKS):
                stack = name.removesuffix(BLOCKS)
                try:
                    weight = from_mx_blocks(get(name), get(f"{stack}{SCALES}"), name=stack)
                except TypeError as error:  # of a tensor, which is no argument of the caller: the file is wrong
                    raise ValueError(f"{error}; {folder.path} is damaged") from error
                shape = tuple(matrix_of(stacks[stack], stacks[stack].weight).shape)
                if weight.shape != shape:
                    raise ValueError(
                        f"{who}: {stack} must be {list(shape)} as config.json says, got {list(weight.shape)}"
                    )
                formats[stack] = PackedFormat.of(weight)
                for part, tensor in to_tensors(weight)[0].items():
                    shards.add(f"{stack}.{part}", tensor)
        shards.close()
    return shards, formats


class MxBlocksWriter:
    """Writes all stacks of experts of a gpt-oss; what else is packed has to become floats.

    Raises:
        ValueError: if the model is another, or one of its stacks is not of mxfp4.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, PackedFormat], where: str) -> None:
        self.stacks: dict[str, ExpertStack] = stacks_in(model)
        if not self.stacks or any(stack.kind != KIND for stack in self.stacks.values()):
            raise ValueError(
                f"{where}: a model must be a gpt-oss to be written in MX blocks, got a {type(model).__name__}; "
                "export it to compressed-tensors"
            )
        for name in self.stacks:
            format = layers.get(name)
            kind = (format.scale_dtype, format.group_size) if format is not None else None
            if kind != ("float8_e8m0fnu", BLOCK):
                got = "floats" if format is None else f"{format.bits} bits, {format.scale_dtype} scales"
                raise ValueError(
                    f"{where}: {name}, as every stack of experts, must be packed in mxfp4, got {got}; quantize with "
                    '--weights mxfp4, or with the rule "re:.*experts.*=mxfp4"'
                )

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        blocks, scales = to_mx_blocks(weight, self.stacks[name].experts, name=name)
        return {BLOCKS: blocks, SCALES: scales}

    def config(self, floats: list[str], head: str | None) -> dict[str, Any]:
        return {"quant_method": METHOD, "modules_to_not_convert": FLOATS}
