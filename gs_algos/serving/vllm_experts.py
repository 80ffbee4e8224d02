"""Computes the experts of a mixture in vLLM with packed stacks, as Transformers holds them: its fused-MoE method.

vLLM loads experts one by one, or stacks of floats. What a stack consists of here, its codes and scales, has no place in
that: `create_weights` puts a loader of its own on the layer, which cuts them for the process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.utils import get_model_architecture

from gs_algos.quant.packed.experts import weighted_sums
from gs_algos.quant.packed.module import PackedFormat, tensors_of
from gs_algos.serving.engine_parameters import get_weight, set_weight
from gs_algos.serving.engine_product import engine_qmatmul_grouped
from gs_algos.serving.expert_shards import DOWN, ExpertShard, Place, expert_shards
from gs_algos.serving.shards import WHO
from gs_kernels.pack.layouts import CANONICAL

GATES: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}
ADVICE = "vLLM reads what golden-stick export --to compressed-tensors writes of them, or use golden-stick serve"


class GoldenStickExpertsMethod(FusedMoEMethodBase):
    """Multiplies tokens, sorted by expert, with packed stacks: one product for gate and up, one for down.

    Args:
        owner: the module of the checkpoint that has the stacks.
        stacks: their formats, uncut.
    """

    def __init__(self, layer: Any, owner: str, stacks: dict[str, PackedFormat]) -> None:
        moe: FusedMoEConfig = layer.moe_config
        super().__init__(moe)
        self.owner, self.stacks = owner, stacks
        _refuse_layer(layer, owner)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        moe = self.moe
        ids = [layer.expert_map_manager.map_global_to_local(e) for e in range(moe.num_experts)]
        own = sorted((e for e, held in enumerate(ids) if held >= 0), key=ids.__getitem__)
        place = Place(moe.num_experts, tuple(own), moe.tp_rank, moe.tp_size)
        inner = intermediate_size_per_partition * moe.tp_size
        shards = expert_shards(self.owner, self.stacks, place, hidden=hidden_size, inner=inner)
        self.shards = {shard.name.rpartition(".")[2]: shard for shard in shards}
        self.layouts = dict.fromkeys(self.shards, CANONICAL)
        self.names = {
            stack: {part: f"{stack}_{part}" for part in tensors_of(shard.format.empty("meta"))}
            for stack, shard in self.shards.items()
        }
        self.missing = {f"{stack}.{part}" for stack, names in self.names.items() for part in names}
        for stack, shard in self.shards.items():
            for part, tensor in tensors_of(shard.format.empty(torch.get_default_device())).items():
                layer.register_parameter(self.names[stack][part], nn.Parameter(tensor, requires_grad=False))
        # that of its class takes no tensor but weights of single experts, and stacks of floats
        layer.load_weights = partial(self._load, layer)

    def _load(self, layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Fills the parameters; gives the name of each that it filled."""
        for name, tensor in weights:
            stack, _, part = name.rpartition(".")
            stack = DOWN if stack == layer.ckpt_down_proj_name else stack  # as some models rename it
            if part not in self.names.get(stack, {}):
                raise ValueError(
                    f"{WHO}: {self.owner} must have tensors of {' and '.join(self.shards)} alone, got {name}; "
                    "the folder is damaged"
                )
            shard, parameter = self.shards[stack], getattr(layer, self.names[stack][part])
            if tensor.dtype != parameter.dtype:
                raise TypeError(f"{WHO}: {part} of {shard.name} must be {parameter.dtype}, got {tensor.dtype}")
            parameter.data.copy_(_cut(shard, part, tensor))
            self.missing.discard(f"{stack}.{part}")
            yield self.names[stack][part]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks what was loaded, and gives the codes the layout that the device reads."""
        if self.missing:
            raise ValueError(
                f"{WHO}: the checkpoint must have {self.owner}.{min(self.missing)}, got none; the folder is incomplete"
            )
        for stack, shard in self.shards.items():
            weight = get_weight(layer, self.names[stack], shard.format, CANONICAL)
            self.layouts[stack] = set_weight(layer, self.names[stack], weight, shard.name)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # of kernels of vLLM

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        ids = topk_ids.long()
        if layer.expert_map is not None:
            ids = torch.where(ids < 0, -1, layer.expert_map[ids].long())
        count = len(self.shards[DOWN].place.own)
        ids = torch.where(ids < 0, count, ids)  # experts of other processes, and none for padding
        return weighted_sums(x, ids, topk_weights, count, partial(self._products, layer))

    def _products(self, layer: Any, x: Tensor, offsets: Tensor) -> Tensor:
        first, down = (
            get_weight(layer, self.names[stack], shard.format, self.layouts[stack])
            for stack, shard in self.shards.items()
        )
        gate, up = engine_qmatmul_grouped(x, first, offsets).chunk(2, dim=-1)
        return engine_qmatmul_grouped(GATES[layer.activation](gate) * up, down, offsets)


def _cut(shard: ExpertShard, part: str, tensor: Tensor) -> Tensor:
    """Cuts a tensor of the checkpoint for the process, if it has the shape that its format says."""
    want = tuple(tensors_of(shard.whole.empty("meta"))[part].shape)
    if tuple(tensor.shape) != want:
        raise ValueError(f"{WHO}: {part} of {shard.name} must be {list(want)}, got {list(tensor.shape)}")
    return shard.cut(part, tensor)


def refuse_loader(stack: str) -> None:
    """Raises for a model that vLLM fills without asking its experts: it would know no tensor of a stack.

    Raises:
        ValueError: so.
    """
    model, name = get_model_architecture(get_current_vllm_config().model_config)
    if hasattr(sys.modules[model.__module__], "fused_moe_make_expert_params_mapping"):
        advice = "vLLM reads a gpt-oss packed in mxfp4 and exported --to mxfp4" if "GptOss" in name else ADVICE
        raise ValueError(f"{WHO}: vLLM's {name} must load stacks of experts, got {stack}, and it loads none; {advice}")


def _refuse_layer(layer: Any, owner: str) -> None:
    """Raises for what the method here does not compute.

    Raises:
        ValueError: so.
    """
    moe: FusedMoEConfig = layer.moe_config
    limited = any(limit is not None for limit in (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta))
    kinds, kind = ", ".join(known.value for known in GATES), layer.activation
    for must, got in (
        ("no biases", "some" if moe.has_bias else ""),
        (f"an activation of {kinds}", "" if kind in GATES else kind.value),
        ("an activation without limits", "one with" if limited else ""),
        ("weights for what they return", "weights for what they read" if layer.apply_router_weight_on_input else ""),
    ):
        if got:
            raise ValueError(f"{WHO}: {owner} must have {must}, got {got}; {ADVICE}")
    copies = max(moe.dp_size, moe.pcp_size, moe.sp_size)
    if copies > 1:
        raise ValueError(
            f"{WHO}: packed experts must be shared by tensor or expert parallelism alone, got data, context or "
            f"sequence parallelism of {copies}; start an engine for each copy of the model"
        )
