"""Builds the language model that a config.json describes, without data, and checks that a folder's tensors fit it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.llm.folder import Folder
from gs_algos.llm.libraries import library
from gs_algos.quant.packed.experts import ExpertStack, is_experts, stacks_of
from gs_algos.quant.packed.module import WEIGHT_TENSORS

OLD = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # once stored, now computed
OURS = ("from_pretrained: ", "quantization_config: ")  # how what is said by this package begins
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Fit:
    """Says where a folder and its model differ. All empty: every tensor of the model is there, and no other.

    Args:
        missing: tensors of the model that the folder has not, by the model's names.
        unused: tensors of the folder that the model has not, by the folder's names.
        wrong: (name, what the model has, what the folder has) of those whose shapes or kinds differ.
    """

    missing: tuple[str, ...]
    unused: tuple[str, ...]
    wrong: tuple[tuple[str, str, str], ...]

    def refuse(self, who: str, path: Path, model: nn.Module) -> None:
        """Raises for the first difference.

        Raises:
            ValueError: so.
        """
        kind = type(model).__name__
        if self.missing:
            more = f" ({len(self.missing)} such tensors)" if len(self.missing) > 1 else ""
            raise ValueError(
                f"{who}: {path} must hold {self.missing[0]}, which the {kind} of config.json needs, got no such "
                f"tensor{more}; the folder is incomplete"
            )
        for name, want, got in self.wrong:
            raise ValueError(f"{who}: {name} in {path} must be {want} as config.json says, got {got}; one is damaged")
        if self.unused:
            more = f" ({len(self.unused)} such tensors)" if len(self.unused) > 1 else ""
            raise ValueError(
                f"{who}: {path} must hold what a {kind} uses, got {self.unused[0]} too{more}; "
                "what is left out would be lost, so take it out first or mend config.json"
            )


@contextmanager
def naming(who: str, what: str) -> Iterator[None]:
    """Turns whatever Transformers or tokenizers raise inside into a ValueError that names the file.

    Raises:
        ValueError: so.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(OURS):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{who}: {what} must be whole, got {type(error).__name__}: {text:.300}") from error


def skeleton(path: Path, who: str = "skeleton") -> nn.Module:
    """Builds the causal language model that config.json describes, on the meta device.

    Raises:
        ValueError: if Transformers does not make one of it.
    """
    transformers = library("transformers")
    with naming(who, f"{path / 'config.json'} of a model that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def fit(
    model: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]], packed: Collection[str] = (), tied: bool = True
) -> Fit:
    """Compares the tensors (name -> dtype, shape) that are no part of a packed layer with those of the model.

    Args:
        packed: layers whose weight is not among the tensors, and need not be.
        tied: whether a tensor may be missing whose partner is there.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = {*packed, *(f"{name}.weight" for name in packed)}  # stacks of experts are named as they are
    filled: set[str] = set()
    unused, wrong = [], []
    for name, (keys, whole) in _renamed(model, tensors).items():
        own = [key for key in keys if key in state]
        filled.update(own)
        dtype, shape = tensors[name]
        if not own:
            unused.append(name)
        elif whole and state[own[0]] != shape:
            wrong.append((name, str(list(state[own[0]])), str(list(shape))))
        elif whole and dtype not in FLOATS and model.state_dict()[own[0]].is_floating_point():
            wrong.append((name, f"of {', '.join(FLOATS)}", dtype))
    missing = set(state) - filled - layers
    holes = _holes(model, state, tensors)
    if tied:
        for target, source in model.all_tied_weights_keys.items():
            if {target, source} & (filled | layers):
                missing -= {target, source}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Fit(
        (*(name for name in state if name in missing and not _any(ignored, name)), *holes),
        tuple(name for name in unused if not _any((*optional, *OLD), name)),
        tuple(wrong),
    )


def part_names_in(model: Any, names: Collection[str]) -> dict[str, str]:
    """Maps names of parts of packed weights from the float model to the folder: they are renamed as weights are."""
    weights = {name: f"{name.rpartition('.')[0]}.weight" for name in names if name.rpartition(".")[2] in WEIGHT_TENSORS}
    renamed = _renamed(model, weights.values())
    return {
        f"{renamed[weight][0][0].removesuffix('weight')}{name.rpartition('.')[2]}": name
        for name, weight in weights.items()
    }


def renamed_parts(folder: Folder, layers: Collection[str], who: str) -> dict[str, str]:
    """Maps names of parts of packed layers from the model to the folder; empty if the folder has the model's names.

    Transformers saves the modules of some models under names of older folders, as `block_sparse_moe` for `mlp`.
    """
    if all(f"{name}.codes" in folder.tensors for name in layers):
        return {}
    return part_names_in(skeleton(folder.path, who), folder.tensors)


def check_ties(model: Any, folder: Folder, get: Callable[[str], Tensor], who: str) -> None:
    """Raises if the folder holds two tensors with different values that the config ties: one would be lost.

    Args:
        get: a tensor of the folder by its name.

    Raises:
        ValueError: so.
    """
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} <= folder.tensors.keys() and not torch.equal(get(target), get(source)):
            raise ValueError(
                f"{who}: {target} in {folder.path} must be {source}, to which config.json ties it, got other values; "
                "set tie_word_embeddings to false, or take one out"
            )


def sources_of(model: Any, names: Collection[str]) -> dict[str, list[str]]:
    """Maps a tensor of the model to those of the folder that it is put together of, in the order of Transformers."""
    from transformers.core_model_loading import dot_natural_key

    parts: dict[str, list[str]] = {}
    for name, (keys, _) in _renamed(model, names).items():
        parts.setdefault(keys[0], []).append(name)
    return {key: sorted(own, key=dot_natural_key) for key, own in parts.items()}


def put_together(model: Any, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Makes a tensor of the model of those of the folder, in the order of `sources_of`, as Transformers does."""
    from transformers.core_model_loading import rename_source_key

    if list(tensors) == [key]:
        return tensors[key]
    converters, renamings = _conversions(model)
    converter, state = None, model.state_dict()
    for name, tensor in tensors.items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            return tensor  # renamed only
        if converter is None:
            converter = copy.deepcopy(next(entry for entry in converters if pattern in entry.source_patterns))
        converter.add_tensor(renamed, name, pattern, tensor)
    assert converter is not None
    made = converter.convert(key, model=model, config=model.config)[key]
    return made[0] if isinstance(made, list) else made


def stacks_in(model: nn.Module) -> dict[str, ExpertStack]:
    """Returns the stacks of experts of a model, by the names of their parameters."""
    return {
        f"{name}.{part}": ExpertStack(module, part)
        for name, module in model.named_modules()
        if is_experts(module)
        for part in stacks_of(module)
    }


def expert_rows(model: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """Maps a stack of experts to the linears that folders hold it as: name -> its first row and the one behind it.

    Transformers is asked to save the numbers of the rows. Stacks that it saves as they are, are not here.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, stack in stacks_in(model).items():
        n = stack.rows(stack.weight).shape[0] // stack.experts
        numbers = torch.arange(stack.experts * n).view(stack.experts, n, 1)
        saved = revert_weight_conversion(model, {name: numbers})
        if name not in saved:
            ends = {key.removesuffix(".weight"): (int(t[0]), int(t[-1]) + 1) for key, t in saved.items()}
            found[name] = dict(sorted(ends.items(), key=lambda item: item[1]))
    return found


def routers(model: Any) -> list[str]:
    """Lists the modules that multiply a weight of their own and are no linears, by their names in a folder."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {
        f"{name}.weight": torch.empty(1)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and (weight := module._parameters.get("weight")) is not None
        and weight.dim() == 2
    }
    return [name.removesuffix(".weight") for name in revert_weight_conversion(model, found)]


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Returns what puts tensors of a folder together, and what renames them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    return converters, [entry for entry in conversions if not isinstance(entry, WeightConverter)]


def _any(patterns: Collection[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _holes(model: Any, state: Mapping[str, tuple[int, ...]], names: Collection[str]) -> list[str]:
    """Lists missing tensors of single experts, where those of others that are stacked with them are there."""
    there = set(names)
    lost: dict[str, None] = {}
    for name, (keys, whole) in _renamed(model, names).items():
        match = None if whole or keys[0] not in state else re.search(r"\.experts\.(\d+)\.", name)
        for i in range(state[keys[0]][0]) if match is not None else ():
            assert match is not None
            sibling = f"{name[: match.start(1)]}{i}{name[match.end(1) :]}"
            if sibling not in there:
                lost[sibling] = None
    return list(lost)


def _renamed(model: Any, names: Collection[str]) -> dict[str, tuple[list[str], bool]]:
    """Maps a name in the folder to names in the model, and says whether the tensor becomes it whole and unchanged.

    Transformers renames tensors of older folders, and puts some together or takes them apart, as experts.
    """
    from transformers.core_model_loading import rename_source_key

    converters, renamings = _conversions(model)
    state = model.state_dict()
    sources: dict[str, tuple[list[str], bool]] = {}
    for name in names:
        key, source = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        keys = [key]
        if source is not None:
            converter = next(entry for entry in converters if source in entry.source_patterns)
            first, *others = converter.target_patterns
            keys += [key.replace(first, other, 1) for other in others]
        if key not in state and name in state:
            keys, source = [name], None
        sources[name] = (keys, source is None)
    return sources
