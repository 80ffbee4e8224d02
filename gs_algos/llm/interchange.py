"""Exports and imports packed language models in other libraries' checkpoint formats, one layer in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gs_algos.llm import mx_blocks
from gs_algos.llm.folder import Folder, ShardWriter, opened_all, read_folder, whole_folder
from gs_algos.llm.foreign_config import BESIDE, ENTRY, OLD_ENTRY, settings_of
from gs_algos.llm.formats import awq, compressed_tensors, gptq
from gs_algos.llm.formats.base import Format, Reader, Writer
from gs_algos.llm.integrity import check_tensors, part_names, verify_files
from gs_algos.llm.packed_config import FOREIGN, METHOD, VERSION, PackedConfig, read_config
from gs_algos.llm.skeleton import check_ties, expert_rows, fit, renamed_parts, routers, skeleton, stacks_in
from gs_algos.quant.packed.experts import ExpertStack, PackedStack
from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat
from gs_algos.quant.packed.packable import base_of, float_weight, matrix_of
from gs_kernels import PackedWeight, unpack_codes
from gs_kernels.pack.checks import check_packed_values
from gs_kernels.pack.rows import rows_between, stack_rows
from gs_kernels.pack.serialize import loaded_scale, to_tensors

Experts: TypeAlias = Mapping[str, Mapping[str, tuple[int, int]]]  # as `expert_rows` gives them
FORMATS: dict[str, Format] = {f.method: f for f in (compressed_tensors.FORMAT, gptq.FORMAT, awq.FORMAT)}
EXPORTS = (*FORMATS, mx_blocks.METHOD)


@dataclass(frozen=True)
class InterchangeResult:
    """Says what was written.

    layers: packed ones. floats: packed layers that the format cannot hold, now floats. kv: the scheme of the cache that
    the source has, and the format has no words for.
    """

    folder: Path
    layers: int
    floats: tuple[str, ...]
    nbytes: int
    kv: str | None = None


def export_language_model(
    source: str | os.PathLike[str], target: str | os.PathLike[str], to: str, *, shard_bytes: int = 2**31
) -> InterchangeResult:
    """Writes a packed folder as the new folder `target` in the format `to`: the same codes, scales and zero points.

    Embeddings, layers tied to one, and for gptq and awq the output head become floats in the dtype of config.json.
    Stacks of experts are written as linears of single experts, or as floats where Transformers has no names for these.
    mxfp4 is the form of gpt-oss: its stacks in MX blocks, all else as floats.

    Args:
        to: "compressed-tensors", "gptq", "awq" or "mxfp4".
        shard_bytes: largest tensor file.

    Raises:
        ValueError: if the source is no packed folder or is damaged, the target is not empty, or a layer has bits,
            groups or zero points that the format cannot hold.
    """
    who = "export_language_model"
    if to not in EXPORTS:
        raise ValueError(f"{who}: to must be one of {', '.join(EXPORTS)}, got {to!r}")
    folder = read_folder(source, who)
    where = f"{who}: {folder.path / 'config.json'}"
    config = read_config(folder.config.get("quantization_config"), where)
    if config.acts:
        raise ValueError(
            f"{who}: {folder.path} must read floats, got {next(iter(config.acts))} and {len(config.acts) - 1} more "
            "that round what they read (acts in config.json); quantize it without --act"
        )
    if config.rotations:
        raise ValueError(
            f"{who}: {folder.path} must run as its layers say, got {next(iter(config.rotations))} and "
            f"{len(config.rotations) - 1} more that are rotated as they run (rotations in config.json); quantize it "
            "without rotate"
        )
    names = renamed_parts(folder, config.layers, who)
    check_tensors(folder, config, who, names)
    verify_files(folder.path, config.files, who)
    model = skeleton(folder.path, who)
    held = {names.get(name, name) for name in part_names(config)}
    plain = {name: facts for name, facts in folder.headers(who).items() if name not in held}
    fit(model, plain, [*config.layers, *config.tied]).refuse(who, folder.path, model)
    _check_packed_shapes(model, config, where)
    experts = expert_rows(model)
    writer: Writer
    if to == mx_blocks.METHOD:
        writer = mx_blocks.MxBlocksWriter(model, config.layers, where)
        floats = {name for name in config.layers if name not in writer.stacks}
    else:
        floats = _floats(model, config, FORMATS[to], experts)
        writer = FORMATS[to].writer([f for name, f in config.layers.items() if name not in floats])
    if len(floats) == len(config.layers):
        raise ValueError(f"{who}: {folder.path} must have a packed linear layer that {to} can hold, got none")
    stacks = stacks_in(model)
    dtype = getattr(torch, str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32"))
    with whole_folder(target, who) as out, opened_all(folder, who) as get:
        shards = ShardWriter(out, shard_bytes)
        ours = {theirs: name for name, theirs in names.items()}
        for name, parts in _grouped([ours.get(name, name) for name in folder.tensors], config.layers).items():
            if parts is None:
                shards.add(name, get(name))
                continue
            own = {part: names.get(f"{name}.{part}", f"{name}.{part}") for part in parts}
            weight = _packed(config.layers[name], {part: get(tensor) for part, tensor in own.items()})
            check_packed_values(who, weight, name)
            if name in floats:
                stack = stacks.get(name)
                if stack is not None:
                    shards.add(name, PackedStack(weight, stack.experts, stack.transposed, dtype).weight)
                else:
                    shards.add(f"{name}.weight", float_weight(model.get_submodule(name), weight, dtype))
                continue
            for linear, (first, end) in experts.get(name, {name: (0, weight.shape[0])}).items():
                for part, tensor in writer.layer(linear, rows_between(weight, first, end)).items():
                    shards.add(f"{linear}{part if part.startswith('_') else f'.{part}'}", tensor)
        shards.close()
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        kept = [name for name in linears if name not in config.layers or name in floats]
        kept += routers(model) if experts else []
        top = model.get_output_embeddings()  # type: ignore[operator]
        head = next((name for name in linears if name not in kept and model.get_submodule(name) is top), None)
        _write_config(out, folder, writer.config(kept, head))
    layers = len(config.layers) - len(floats)
    return InterchangeResult(Path(target), layers, tuple(sorted(floats)), shards.nbytes, config.kv)


def import_language_model(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, shard_bytes: int = 2**31
) -> InterchangeResult:
    """Reads a compressed-tensors, GPTQ or AWQ folder, or the MX blocks of gpt-oss, into the new packed folder `target`.

    Exact. Linears of single experts become stacks.

    The settings are those of config.json, or of the quantize_config.json or quant_config.json beside it.

    Raises:
        ValueError: if the source is of no such format or is damaged, the target is not empty, a tensor is missing or
            one too many, the config says what is not used here or what its tensors contradict, or a layer has what ours
            have not: 3 bits, an act-order, quantized activations.
    """
    who = "import_language_model"
    folder = read_folder(source, who)
    settings = settings_of(folder, who)
    method = None if settings is None else settings.method
    if settings is None or not isinstance(method, str) or method not in FOREIGN:
        where = f"{who}: {folder.path / 'config.json'}" if settings is None else settings.where
        advice = "it is packed already" if method == METHOD else "for a float model use quantize"
        raise ValueError(f"{where}: quant_method must be one of {', '.join(FOREIGN)}, got {method!r}; {advice}")
    if method == mx_blocks.METHOD:
        with whole_folder(target, who) as out:
            shards, formats = mx_blocks.read_mx_blocks(folder, settings, out, shard_bytes, who)
            _write_config(out, folder, _imported(formats, method, shards))
        return InterchangeResult(Path(target), len(formats), (), shards.nbytes)
    format = FORMATS[method]
    reader = format.reader(settings.entries, settings.where)
    model = skeleton(folder.path, who)
    experts = expert_rows(model)
    layers = _foreign_layers(folder, model, format, experts, who)
    parts_of = {linear: stack for stack, own in experts.items() for linear in own if linear in layers}
    _refuse_holes(experts, layers, folder, format, who)
    _check_layers_agree(model, layers, reader, format, settings.where)
    formats = {}
    with opened_all(folder, who) as get:
        idle = _check_floats(folder, model, [*layers, *parts_of.values()], format, get, who)
        with whole_folder(target, who) as out:
            shards = ShardWriter(out, shard_bytes)
            held: dict[str, dict[str, PackedWeight]] = {}  # of experts, until a stack is whole
            for name, parts in _grouped(folder.tensors, layers, format.parts).items():
                if parts is None:
                    if name not in idle:
                        shards.add(name, get(name))
                    continue
                try:
                    weight = reader.layer(name, {part: get(f"{name}.{part}") for part in parts})
                except TypeError as error:  # of a tensor, which is no argument of the caller: the file is wrong
                    raise ValueError(f"{error}; {folder.path} is damaged") from error
                _check_weight(who, layers[name], name, weight)
                if name in parts_of:
                    stack = parts_of[name]
                    waiting = held.setdefault(stack, {})
                    waiting[name] = weight
                    if len(waiting) < len(experts[stack]):
                        continue
                    name, weight = stack, stack_rows([waiting[linear] for linear in experts[stack]])
                    del held[stack]
                formats[name] = PackedFormat.of(weight)
                for part, tensor in to_tensors(weight)[0].items():
                    shards.add(f"{name}.{part}", tensor)
            shards.close()
            _write_config(out, folder, _imported(formats, method, shards))
    return InterchangeResult(Path(target), len(formats), (), shards.nbytes)


def _imported(formats: Mapping[str, PackedFormat], method: str, shards: ShardWriter) -> dict[str, Any]:
    """Returns the `quantization_config` of what was imported."""
    described = {name: format.to_dict() for name, format in formats.items()}
    written = {"quant_method": METHOD, "version": VERSION, "weights": f"from {method}", "layers": described}
    return {**written, "tied": {}, "files": shards.hashes}


def _refuse_holes(experts: Experts, layers: Collection[str], folder: Folder, format: Format, who: str) -> None:
    """Raises unless all experts of a stack are in the folder, or none.

    Raises:
        ValueError: so.
    """
    for linears in experts.values():
        lost = [linear for linear in linears if linear not in layers]
        if lost and len(lost) < len(linears):
            raise ValueError(
                f"{who}: {folder.path} must hold all experts of a stack in {format.method}, got no {lost[0]}."
                f"{format.marker} ({len(lost)} of {len(linears)} such); the folder is incomplete"
            )


def _foreign_layers(
    folder: Folder, model: nn.Module, format: Format, experts: Experts, who: str
) -> dict[str, nn.Linear]:
    """Finds the linear layers of the model, and linears of its experts, of which the folder has tensors of the format.

    Raises:
        ValueError: if there are none, or there are parts of something else.
    """
    modules = dict(model.named_modules())
    for stack, linears in experts.items():
        columns = matrix_of(stacks_in(model)[stack], model.get_parameter(stack)).shape[1]
        for linear, (first, end) in linears.items():
            modules[linear] = nn.Linear(columns, end - first, bias=False, device="meta")
    foreign: dict[str, nn.Linear] = {}
    for tensor in folder.tensors:
        name, _, part = tensor.rpartition(".")
        layer = modules.get(name)
        if part not in format.parts:
            continue
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{who}: {name} must be a linear layer of the model in config.json, got {tensor}; "
                "what Transformers holds in one tensor, as experts, cannot be imported"
            )
        foreign[name] = layer
    if not foreign:
        raise ValueError(
            f"{who}: {folder.path} must hold layers of {format.method}, got no tensor that ends in .{format.marker}"
        )
    return foreign


def _check_layers_agree(
    model: nn.Module, layers: Mapping[str, nn.Linear], reader: Reader, format: Format, where: str
) -> None:
    """Raises if the config says of a linear layer that it is packed and it is not, or the other way round."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied: Any = model.all_tied_weights_keys
    own = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in {**own, **layers}.items():
        says = reader.packs(name, layer, layer is head)
        if says is not None and says[0] != (name in layers) and (says[0] is False or f"{name}.weight" not in tied):
            want, got = ("packed", f"no {name}.{format.marker}") if says[0] else ("float", f"{name}.{format.marker}")
            raise ValueError(f"{where}: {name} must be {want} as {says[1]} says, got {got}; the folder is incomplete")


def _check_floats(
    folder: Folder, model: nn.Module, layers: Collection[str], format: Format, get: Any, who: str
) -> set[str]:
    """Raises unless what is not packed is what the model needs; the biases of zeros that nobody needs.

    Some packers add those to layers that have none.
    """
    plain = {
        name: facts
        for name, facts in folder.headers(who).items()
        if not (name.rpartition(".")[0] in layers and name.rpartition(".")[2] in format.parts)
    }
    fitted = fit(model, plain, layers)
    idle = {
        name
        for name in fitted.unused
        if name.rpartition(".")[0] in layers and name.endswith(".bias") and not bool(get(name).any())
    }
    replace(fitted, unused=tuple(name for name in fitted.unused if name not in idle)).refuse(who, folder.path, model)
    check_ties(model, folder, get, who)
    return idle


def _check_packed_shapes(model: nn.Module, config: PackedConfig, where: str) -> None:
    """Raises unless every packed layer is one of the model, and of its shape."""
    modules: dict[str, nn.Module] = {**dict(model.named_modules()), **stacks_in(model)}
    for owner, format in config.layers.items():
        for name in config.names(owner):
            layer = modules.get(name)
            if layer is None or (base_of(layer) is None and not isinstance(layer, ExpertStack)):
                raise ValueError(f"{where}: {name} must be a layer of a {type(model).__name__}, got none such")
            shape = tuple(matrix_of(layer, layer.weight).shape)  # type: ignore[arg-type]
            if shape != format.shape:
                raise ValueError(f"{where}: {name} must be {list(shape)} as the rest says, got {list(format.shape)}")


def _floats(model: nn.Module, config: PackedConfig, format: Format, experts: Experts) -> set[str]:
    """Lists the packed layers that the format cannot hold."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()  # type: ignore[operator]
    shared = set(config.tied.values())
    return {
        name
        for name in config.layers
        if (not isinstance(modules.get(name), nn.Linear) and name not in experts)
        or name in shared
        or (modules.get(name) is head and not format.heads)
    }


def _grouped(tensors: Any, layers: Any, known: tuple[str, ...] = WEIGHT_TENSORS) -> dict[str, list[str] | None]:
    """Groups tensors in the order of the files: layer -> its tensors, and for every other tensor its name -> None."""
    owners = set(layers)
    parts_of: dict[str, list[str] | None] = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if layer in owners and part in known:
            parts = parts_of.setdefault(layer, [])
            assert parts is not None
            parts.append(part)
        else:
            parts_of[name] = None
    return parts_of


def _packed(format: PackedFormat, tensors: dict[str, Tensor]) -> PackedWeight:
    zero: Any = tensors["zero"] if format.zero is None else format.zero
    levels = tensors.get("levels")
    args = format.bits, format.shape, format.group_size
    scale = loaded_scale(tensors["scale"])
    return PackedWeight(tensors["codes"], scale, zero, levels, *args, divisor=tensors.get("divisor"))


def _check_weight(who: str, layer: nn.Linear, name: str, weight: PackedWeight) -> None:
    """Raises unless the weight has the shape of its layer, and a scale for every group that has codes."""
    shape = list(layer.weight.shape)
    if shape != list(weight.shape):
        raise ValueError(
            f"{who}: {name} must be of shape {shape} as config.json says, got a packed weight of {list(weight.shape)}"
        )
    lost = weight.scale.float() == 0
    if bool(lost.any()):
        grouped = unpack_codes(weight.codes, weight.bits, weight.shape).unflatten(1, (-1, weight.group_size))
        zero = weight.zero[..., None] if isinstance(weight.zero, Tensor) else weight.zero
        if bool(((grouped != zero).any(-1) & lost).any()):
            raise ValueError(
                f"{who}: scales of {name} must not be 0 for codes that are not, got {int(lost.sum())} such groups; "
                "the file is damaged"
            )


def _write_config(out: Path, folder: Folder, entry: dict[str, Any]) -> None:
    config = {key: value for key, value in folder.config.items() if key != OLD_ENTRY}
    (out / "config.json").write_text(json.dumps({**config, ENTRY: entry}, indent=2))
    for file in folder.companions():
        if file.name not in BESIDE:
            shutil.copyfile(file, out / file.name)
