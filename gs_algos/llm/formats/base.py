"""Defines what a checkpoint format must have to be exported to and imported from."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gs_algos.quant.packed.module import PackedFormat
from gs_kernels import PackedWeight

# what packers note of how they worked: the tensors are what they are whatever it says
NOTES = (
    "tokenizer", "dataset", "damp_percent", "damp_auto_increment", "true_sequential", "act_group_aware", "hyb_act",
    "mse", "model_seqlen", "module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length",
    "cache_block_outputs", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "backend", "meta",
    "model_name_or_path", "model_file_base_name", "gptaq", "gptaq_alpha", "foem", "offload_to_disk",
    "offload_to_disk_path", "pack_impl", "fallback", "failsafe", "failsafe_strategy", "failsafe_threshold", "hessian",
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "block_name_to_quantize", "to_quant_block_names", "iters", "lr",
    "minmax_lr", "nsamples", "seqlen", "provider", "autoround_version", "low_gpu_mem_usage", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "quant_block_list", "amp", "gradient_accumulate_steps",
    "train_bs", "packing_format", "quantizer", "process", "gc_mode", "vram_strategy",
)  # fmt: skip


class Writer(Protocol):
    """Turns packed layers into the tensors of a format, and afterwards describes them all."""

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        """Returns the tensors of one layer, by their names behind the layer's, and a dot if they begin with no `_`."""

    def config(self, floats: list[str], head: str | None) -> dict[str, Any]:
        """Returns the `quantization_config`.

        Args:
            floats: linear layers that were not given to `layer`.
            head: the output head, if it was given to `layer`.
        """


class Reader(Protocol):
    """Turns the tensors of a format into packed layers."""

    def packs(self, name: str, layer: nn.Module, head: bool) -> tuple[bool, str] | None:
        """Says whether the config has a linear layer packed, and which words say so; None: it says neither.

        Called for every linear layer of the model, before `layer` is for those that are packed.

        Args:
            head: whether it is the output head.
        """

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """Makes the packed weight of one layer from the tensors behind its name."""


@dataclass(frozen=True)
class Format:
    """Describes one format.

    Args:
        method: its `quant_method` in config.json.
        marker: the tensor that every layer of it has; parts: all that a layer may have.
        heads: whether readers take a packed output head; else it is written as floats.
        writer: makes a writer for layers of these formats.
        reader: makes a reader from the `quantization_config`, or refuses it.
    """

    method: str
    marker: str
    parts: tuple[str, ...]
    heads: bool
    writer: Callable[[Collection[PackedFormat]], Writer]
    reader: Callable[[Mapping[str, Any], str], Reader]


def take(config: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str, default: Any = None) -> Any:
    """Reads a value of the config; the default, if there is one, stands for null and for a missing key.

    Raises:
        ValueError: if it is missing or of another kind.
    """
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: {key} must be {names}, got {value!r:.80}; the config is damaged or too old")
    return value


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises for a key that no code here uses, unless it says nothing: null, false or empty.

    Raises:
        ValueError: so.
    """
    for key, value in config.items():
        if key not in known and value is not None and value is not False and value not in ({}, []):
            raise ValueError(
                f"{where}: keys must be those that are used here, got {key} {value!r:.80}; "
                "what it says would be lost, so load the model with the library that wrote it"
            )


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles the regular expression.

    Raises:
        ValueError: if it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: patterns must be regular expressions, got {pattern!r:.80}: {error}") from error


def strings(value: Any, key: str, where: str) -> list[str]:
    """Reads a list of strings, empty for null.

    Raises:
        ValueError: if it is something else.
    """
    items = [] if value is None else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{where}: {key} must be an array of names, got {value!r:.80}; the config is damaged")
    return items
