"""Has Transformers build the packed layers of a folder, and describe those of a model that was packed in memory.

Importing this registers `quant_method: golden-stick`; `registration` does so when Transformers is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gs_algos.llm.folder import read_folder
from gs_algos.llm.integrity import check_tensors, verify_files
from gs_algos.llm.kv_cache import GeneratesQuantized, generates_quantized
from gs_algos.llm.packed_config import METHOD, VERSION, PackedConfig, read_config
from gs_algos.llm.skeleton import part_names_in
from gs_algos.ptq.weights import install
from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.embedding import PackedEmbedding
from gs_algos.quant.packed.experts import PackedExperts, PackedStack, is_experts, stacks_of
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedConv1D, PackedLinear
from gs_algos.quant.packed.module import Packed, PackedFormat
from gs_algos.quant.rotation import install_rotations, rotations_of
from gs_kernels.pack.checks import check_packed, check_packed_values

WHO = "from_pretrained"
LAYERS = (
    PackedLinear,
    DynamicPackedLinear,
    PackedConv1D,
    PackedConv,
    PackedEmbedding,
    PackedStack,
)  # those that a description can name


@register_quantization_config(METHOD)
class GoldenStickConfig(QuantizationConfigMixin):
    """Holds the `quantization_config` of config.json, as it stands there."""

    def __init__(self, **data: Any) -> None:
        self.__dict__.update(data)
        self.packed_config()

    def packed_config(self) -> PackedConfig:
        return read_config(self.__dict__, "quantization_config")


@register_quantizer(METHOD)
class GoldenStickQuantizer(HfQuantizer):
    """Puts empty packed layers into the skeleton, which Transformers then fills by name."""

    quantization_config: GoldenStickConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = _of_model(self.quantization_config.packed_config(), model)
        for folder in {Path(file).parent for file in kwargs.get("checkpoint_files") or ()}:
            held = read_folder(folder, WHO, code=True)
            check_tensors(held, config, WHO, part_names_in(model, held.tensors))
            verify_files(folder, config.files, WHO)
        # what is saved from this model has files of its own, and the names of this model
        quantization = self.quantization_config.__dict__
        quantization.pop("files", None)
        quantization["layers"] = {name: format.to_dict() for name, format in config.layers.items()}
        quantization["tied"] = config.tied
        if config.acts:
            quantization["acts"] = config.acts
        if config.rotations:
            quantization["rotations"] = {
                name: {side: asdict(rotation) for side, rotation in sides.items()}
                for name, sides in config.rotations.items()
            }
        for owner, format in config.layers.items():
            install(model, config.names(owner), format.empty("meta"), config.acts.get(owner))
        install_rotations(model, config.rotations)
        _untie(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, Packed) and not module.tied:
                check_packed(WHO, module.packed, name)
                check_packed_values(WHO, module.packed, name)
                module.arrange()
        if self.quantization_config.packed_config().kv is not None:
            generates_quantized(model)
        _keep_stacks(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: packed weights are frozen, and gradients pass through them


class Unsaved(HfQuantizer):
    """Refuses `save_pretrained` of a model whose layers `from_pretrained` could not build again."""

    def __init__(self, reason: str) -> None:
        super().__init__(QuantizationConfigMixin(METHOD))  # type: ignore[arg-type]
        self.reason = reason

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        raise ValueError(
            f"save_pretrained: the layers must be float or packed by quantize_weights, got {self.reason}; "
            "from_pretrained would fill it with random weights, so use gs_algos.save and gs_algos.load"
        )

    @property
    def is_trainable(self) -> bool:
        return True


def describe(model: nn.Module, entry: dict[str, Any]) -> None:
    """Gives every Transformers model in `model` the config that says how its layers are packed, for `save_pretrained`.

    A model with a head gets a config of its own: networks that were built from the same one are not packed.

    Args:
        entry: of the history, for how it came about.
    """
    from transformers.modeling_utils import PreTrainedModel

    written: set[int] = set()
    copies: dict[int, Any] = {}
    for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if id(part.config) in written or not any(_ours(module) for module in part.modules()):
            continue
        try:
            quantization = _quantization_of(part, entry)
        except ValueError as error:
            part.hf_quantizer = Unsaved(str(error))  # type: ignore[assignment]
            continue
        inner = part.base_model is part  # perhaps of a model with a head, which shares its config
        if not inner and all(part.config is not copied for copied in copies.values()):
            copy.deepcopy(part.config, copies)
            for module in part.modules():
                held = module.__dict__.get("config")
                module.__dict__.update({} if id(held) not in copies else {"config": copies[id(held)]})
        part.config.quantization_config = GoldenStickConfig(**quantization)
        written.add(id(part.config))
        _untie(part)
        _keep_stacks(part)
        if "kv" in quantization:
            generates_quantized(part)


def _ours(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("gs_algos.")
    return ours and not isinstance(module, GeneratesQuantized | PackedExperts)


def _quantization_of(model: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
    """Makes the `quantization_config` of a live model.

    Raises:
        ValueError: if it has a layer that none can describe.
    """
    packed = [(name, module) for name, module in model.named_modules() if _ours(module)]
    odd = next((pair for pair in packed if type(pair[1]) not in LAYERS), None)
    if odd is not None:
        raise ValueError(f"{odd[0]}, a {type(odd[1]).__name__} of {entry['algorithm']}")
    owners = {id(module): name for name, module in packed if not module.tied}  # type: ignore[union-attr]
    layers, tied = {}, {}
    for name, module in packed:
        assert isinstance(module, Packed)
        if not module.tied:
            layers[name] = PackedFormat.of(module.packed).to_dict()
        elif id(module.owner) not in owners:
            raise ValueError(f"{name}, which is tied to a layer outside; save the whole model")
        else:
            tied[name] = owners[id(module.owner)]
    settings = {key: entry["config"].get(key) for key in ("weights", "embeddings", "rules")}
    settings |= {key: value for key, value in entry["config"].items() if key == "kv"}
    acts = {name: module.act for name, module in packed if isinstance(module, DynamicPackedLinear)}
    described = {"quant_method": METHOD, "version": VERSION, **settings, "layers": layers, "tied": tied}
    rotations = rotations_of(model)
    return {**described, **({"acts": acts} if acts else {}), **({"rotations": rotations} if rotations else {})}


def _of_model(config: PackedConfig, model: Any) -> PackedConfig:
    """Returns the folder's layers that this model has, by its names: one without head, or with another, lacks some.

    Raises:
        ValueError: if it has none.
    """
    modules = {name for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        modules |= {f"{name}.{part}" for part in stacks_of(module)} if is_experts(module) else set()
    prefix = model.base_model_prefix
    own = {name: found for name in (*config.layers, *config.tied) if (found := _placed(name, modules, prefix))}
    layers = {own[name]: format for name, format in config.layers.items() if name in own}
    tied = {own[name]: own[owner] for name, owner in config.tied.items() if name in own and owner in own}
    for target, source in model.all_tied_weights_keys.items():
        pair = target.removesuffix(".weight"), source.removesuffix(".weight")
        for name, owner in (pair, pair[::-1]):
            if owner in layers and name not in layers and name in modules:
                tied[name] = owner
    if not layers:
        raise ValueError(
            f"{WHO}: config.json must describe packed layers of a {type(model).__name__}, got "
            f"{', '.join(list(config.layers)[:2])}; load the folder as what its architectures say"
        )
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    lost = sorted(set(config.layers) - set(own)) if whole and model.base_model is not model else []
    if lost:
        raise ValueError(f"{WHO}: {lost[0]} in config.json must be a layer of {type(model).__name__}, got none such")
    acts = {own[name]: act for name, act in config.acts.items() if name in own}
    turned = {place: sides for name, sides in config.rotations.items() if (place := _placed(name, modules, prefix))}
    return replace(config, layers=layers, tied=tied, acts=acts, rotations=turned)


def _placed(name: str, modules: Iterable[str], prefix: str) -> str | None:
    """Renames a layer for a model that lacks the prefix of its base model, or has it where the folder has not."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in modules:
            return candidate
    return None


def _keep_stacks(model: Any) -> None:
    """Has `save_pretrained` write stacks of experts as they are: it takes the tensors of packed ones for floats."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    if not any(isinstance(module, PackedStack) for module in model.modules()):
        return
    held = getattr(model, "_weight_conversions", None)
    if held is None:
        held = [
            one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)
        ]
    targets = (".gate_up_proj", ".up_proj", ".down_proj")
    model._weight_conversions = [
        one
        for one in held
        if not (isinstance(one, WeightConverter) and any(t.endswith(targets) for t in one.target_patterns))
    ]


def _untie(model: nn.Module) -> None:
    """Takes packed layers out of what Transformers ties: they share one weight already, and have no parameter."""
    from transformers.modeling_utils import PreTrainedModel

    for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        packed = {f"{name}.weight" for name, module in part.named_modules() if isinstance(module, Packed)}
        ties = getattr(part, "all_tied_weights_keys", None) or {}
        if packed & {*ties, *ties.values()}:
            left = {target: source for target, source in ties.items() if not {target, source} & packed}
            part.all_tied_weights_keys = left
            part._tied_weights_keys = dict(left)
