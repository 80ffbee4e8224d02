"""Loads our packed checkpoints in vLLM (`quant_method: golden-stick`): linear layers, experts, embeddings, heads.

vLLM builds each layer with the parameters that its method creates, fills them by name from the checkpoint, cutting them
for tensor parallelism, and calls `process_weights_after_loading`. Its classes have to be at module level: they are
pickled into its other processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from gs_algos.llm.folder import read_folder
from gs_algos.llm.integrity import check_tensors, verify_files
from gs_algos.llm.packed_config import METHOD, PackedConfig, read_config
from gs_algos.llm.skeleton import renamed_parts
from gs_algos.ptq.kv import elsewhere
from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat, tensors_of
from gs_algos.serving.engine_parameters import get_weight, set_weight
from gs_algos.serving.engine_product import engine_qmatmul
from gs_algos.serving.expert_shards import STACK, check_cuts, experts_at
from gs_algos.serving.shards import WHO, refuse_unserved, shard, stacked
from gs_algos.serving.vllm_experts import GoldenStickExpertsMethod, refuse_loader
from gs_algos.serving.vllm_kernel import CAPABILITY
from gs_kernels import PackedWeight, dequantize_packed
from gs_kernels.pack.layouts import CANONICAL
from gs_kernels.pack.rows import rows_of

logger = logging.getLogger(__name__)

NAMES = {part: part for part in WEIGHT_TENSORS}  # of the parameters
MERGED = {"gate_up_proj": ["gate_proj", "up_proj"]}  # which models with some layers of experts say only when built


class GoldenStickVllmConfig(QuantizationConfig):
    """Reads the `quantization_config` of config.json: which layers are packed, and how."""

    def __init__(self, config: PackedConfig) -> None:
        super().__init__()
        self.config = config
        self.layers, self.tied = dict(config.layers), dict(config.tied)
        self.mixtures: dict[str, str] = {}  # names of modules of experts that differ in vLLM
        self.parts = 0  # among which the experts are known to be cut
        refuse_unserved(self.layers)
        if config.kv is not None:
            logger.warning("%s: %s, see its --kv-cache-dtype", WHO, elsewhere(config.kv, "vLLM"))
        if config.acts:
            raise ValueError(
                f"{WHO}: layers must read floats, got {next(iter(config.acts))} and {len(config.acts) - 1} more that "
                "round what they read (acts in quantization_config); quantize without --act, or use golden-stick serve"
            )
        if config.rotations:
            raise ValueError(
                f"{WHO}: layers must read what vLLM gives them, got {next(iter(config.rotations))} and "
                f"{len(config.rotations) - 1} more that are rotated as they run (rotations in quantization_config); "
                "quantize without rotate, or use golden-stick serve"
            )

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GoldenStickVllmConfig:
        return cls(read_config(config, f"{WHO}: quantization_config"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks the files of a local folder, before any process loads them; of a name on a hub there is none yet."""
        if Path(model_name).is_dir():
            folder = read_folder(model_name, WHO, code=True)  # vLLM has decided about code by now
            check_tensors(folder, self.config, WHO, renamed_parts(folder, self.config.layers, WHO))
            verify_files(folder.path, self.config.files, WHO)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames layers to the names that vLLM's model has."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        owners = hf_to_vllm_mapper.apply_dict(self.tied)
        self.tied = {name: hf_to_vllm_mapper.apply_list([owner])[0] for name, owner in owners.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Renames modules of experts in the names of tensors, as vLLM's own mapper of the model does not."""
        return WeightsMapper(orig_to_new_substr=self.mixtures)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_experts()
        if isinstance(layer, RoutedExperts):
            owner, stacks = experts_at(self.layers, prefix)
            if owner != prefix:
                self.mixtures[_tail(owner)] = _tail(prefix)
            return GoldenStickExpertsMethod(layer, owner, stacks) if stacks else None
        parent, _, last = prefix.rpartition(".")
        parts = (MERGED | self.packed_modules_mapping).get(last, [last])
        names = [f"{parent}.{part}" if parent else part for part in parts]
        if isinstance(layer, LinearBase):
            format = stacked(self.layers, names)
            return UnquantizedLinearMethod() if format is None else GoldenStickLinearMethod(format, names)
        if isinstance(layer, VocabParallelEmbedding):
            owner = self.tied.get(prefix, prefix) or self._table_of(layer)
            return GoldenStickEmbeddingMethod(self.layers[owner], [owner]) if owner in self.layers else None
        return None

    def _check_experts(self) -> None:
        """Raises if vLLM's model does not load stacks of experts, or tensor parallelism cannot cut them.

        Of the latter vLLM asserts less, and without a word.
        """
        stacks = [name for name in self.config.layers if STACK.match(name)]
        if stacks and not self.parts:
            refuse_loader(stacks[0])
        whole = get_current_vllm_config().parallel_config.enable_expert_parallel
        parts = 1 if whole else get_tensor_model_parallel_world_size()
        if parts != self.parts:
            check_cuts(self.layers, parts)
            self.parts = parts

    def _table_of(self, layer: VocabParallelEmbedding) -> str:
        """Finds the packed table of an embedding whose model, as vLLM's Llama, gives no name; "" if there is none."""
        sizes = (layer.org_vocab_size, layer.embedding_dim)
        found = [name for name, format in self.layers.items() if format.shape == sizes and "lm_head" not in name]
        if len(found) > 1:
            raise ValueError(f"{WHO}: one packed table must have sizes {list(sizes)}, got {', '.join(found)}")
        return found[0] if found else ""


class LevelsParameter(BasevLLMParameter):
    """Holds the levels of each stacked layer, `[layers, 2**bits]`, or `[2**bits]` of one: whole in every process."""

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        part = self.data[self._shard_id_as_int(kwargs["shard_id"])] if self.data.dim() > 1 else self.data
        part.copy_(loaded_weight)

    load_qkv_weight = load_merged_column_weight


@register_weight_loader_v2_supported_method
class GoldenStickLinearMethod(LinearMethodBase):
    """Computes a linear layer, or several that vLLM stacks into one, with packed weights.

    Args:
        format: of the whole weight, uncut, the layers stacked.
        names: of these layers in the checkpoint.
    """

    def __init__(self, format: PackedFormat, names: Sequence[str]) -> None:
        self.format, self.names = format, list(names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self._check_sizes(layer, output_size, input_size)
        rows = sum(output_partition_sizes)
        self.shard = shard(self.format, self.names[0], rows, input_size_per_partition)
        self.dtype, self.layout = params_dtype, CANONICAL
        self.filled = dict.fromkeys(tensors_of(self.shard.empty("meta")), 0)
        for part, tensor in tensors_of(self.shard.empty(torch.get_default_device())).items():
            layer.register_parameter(part, self._parameter(part, tensor, self._strict(part, extra["weight_loader"])))

    def _check_sizes(self, layer: nn.Module, rows: int, columns: int) -> None:
        if isinstance(layer, VocabParallelEmbedding):
            rows = layer.org_vocab_size
        if getattr(layer, "num_kv_head_replicas", 1) > 1:
            rows = self.format.shape[0]  # vLLM counts the rows of k and v once per process
        if (rows, columns) != tuple(self.format.shape):
            raise ValueError(
                f"{WHO}: {', '.join(self.names)} must be [{rows}, {columns}] as the model's sizes say, got "
                f"{list(self.format.shape)} in quantization_config; config.json is damaged, or of another model"
            )

    def _parameter(self, part: str, tensor: Tensor, loader: Callable[..., None]) -> BasevLLMParameter:
        both = {"data": tensor, "weight_loader": loader}
        if part == "codes":
            return PackedvLLMParameter(
                input_dim=1, output_dim=0, packed_dim=1, packed_factor=Fraction(8, self.format.bits), **both
            )
        if part == "levels":
            tables = tensor if len(self.names) == 1 else tensor.repeat(len(self.names), 1)
            return LevelsParameter(data=tables, weight_loader=loader)
        if self.format.group_size == self.format.shape[1]:  # one scale a row, which every part along K needs
            return ChannelQuantScaleParameter(output_dim=0, **both)
        return GroupQuantScaleParameter(input_dim=1, output_dim=0, **both)

    def _strict(self, part: str, loader: Callable[..., None]) -> Callable[..., None]:
        """Wraps the loader, which would cast silently, in a check of the dtype; counts what was filled."""

        def load(param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
            if loaded.dtype != param.dtype:
                raise TypeError(f"{WHO}: {part} of {self.names[0]} must be {param.dtype}, got {loaded.dtype}")
            loader(param, loaded, *args, **kwargs)
            self.filled[part] += 1

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Checks what was loaded, and gives the codes the layout that the device reads."""
        for part, times in self.filled.items():
            if times != len(self.names):
                raise ValueError(
                    f"{WHO}: the checkpoint must have {part} of {', '.join(self.names)}, got {times} of "
                    f"{len(self.names)}; the folder is incomplete"
                )
        weight = self.weight(layer)
        if weight.levels is not None:
            weight = replace(weight, levels=self._one_table(weight.levels))
        self.layout = set_weight(layer, NAMES, weight, self.names[0])

    def _one_table(self, tables: Tensor) -> Tensor:
        if tables.dim() > 1 and bool((tables != tables[0]).any()):
            raise ValueError(f"{WHO}: {', '.join(self.names)} must have the same levels, got different ones")
        return tables if tables.dim() == 1 else tables[0].clone()

    def weight(self, layer: nn.Module) -> PackedWeight:
        """Returns the packed weight whose tensors are the layer's parameters."""
        return get_weight(layer, NAMES, self.shard, self.layout)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return engine_qmatmul(x, self.weight(layer), bias)


class GoldenStickEmbeddingMethod(GoldenStickLinearMethod):
    """Computes an embedding or a head with a packed table, whose rows that pad the vocabulary are zero."""

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        rows = rows_of(self.weight(layer), ids.reshape(-1))
        return dequantize_packed(rows, self.dtype).view(*ids.shape, -1)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Has the head use the table of the embedding, and removes its own."""
        for part in self.filled:
            delattr(layer, part)
        layer.quant_method = TiedMethod(embed_tokens)
        return layer


class TiedMethod(LinearMethodBase):
    """Computes a head whose table belongs to an embedding."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        raise RuntimeError(f"{WHO}: a tied head has no weights of its own")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.owner.quant_method.apply(self.owner, x, bias)


def _tail(name: str) -> str:
    """Returns the last two modules of a name, between dots: those of a mixture and of its experts."""
    return f".{'.'.join(name.split('.')[-2:])}."


def register() -> None:
    register_quantization_config(METHOD)(GoldenStickVllmConfig)
