"""Packs a language model on disk into a new folder, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.arguments import as_device, as_path
from gs_algos.core.plan import Plan, PlanRow, other_weights, totals_of
from gs_algos.core.progress import progress as progress_bar
from gs_algos.llm.folder import Folder, ShardWriter, nbytes_of, opened, opened_all, read_folder, whole_folder
from gs_algos.llm.foreign_config import settings_of as settings_of_folder
from gs_algos.llm.formats import awq, compressed_tensors, gptq
from gs_algos.llm.load import gguf_skeleton, is_gguf, load_gguf, refuse_dtype
from gs_algos.llm.packed_config import FOREIGN, to_config
from gs_algos.llm.skeleton import check_ties, fit, put_together, skeleton, sources_of
from gs_algos.ptq.kv import KVScheme, refuse_without_cache
from gs_algos.ptq.sites import SMALLEST_GROUP, Site, WeightRule, check_schemes, weight_sites
from gs_algos.ptq.weights import settings_of, site_row
from gs_algos.quant.packed.experts import ExpertStack
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.packed.packable import matrix_of, rounded
from gs_algos.quant.scheme import Scheme
from gs_kernels.pack.serialize import to_tensors

WHO = "quantize_checkpoint"
WHOLE_ROWS = "int4@channel"  # the default where no group divides
FOREIGN_PARTS = {*gptq.PARTS, *awq.PARTS, *compressed_tensors.PARTS, "codes"}


@dataclass(frozen=True)
class QuantizeResult:
    """Says what `quantize_checkpoint` wrote.

    Args:
        packed, kept: weights of two and more axes that were packed, and that stay float.
        before, after: bytes of the tensors, those of the source as they are on disk.
        scheme: of the weights: the one asked for, or the one that was chosen.
        plan: a row for each weight, with the reason for those that stay float, and the totals.
        notes: what else there is to know, each a sentence.
        numbers: how many each weight of the plan has, by the name in its row.
    """

    folder: Path
    packed: int
    kept: int
    before: int
    after: int
    scheme: str
    plan: Plan
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)

    def floats(self) -> list[tuple[PlanRow, int]]:
        """Lists the rows of the plan that stay float, each with how many numbers it has."""
        return [(row, self.numbers[row.site]) for row in self.plan.kept()]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weights: str | Scheme | None = None,
    *,
    embeddings: str | Scheme | None = None,
    rules: Sequence[WeightRule] = (),
    kv: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    shard_bytes: int = 2**31,
) -> QuantizeResult:
    """Packs a Transformers folder or a GGUF file into the new folder `target`, as `quantize_weights` packs a model.

    A Transformers folder is read tensor by tensor, so it may be larger than memory; a GGUF file is loaded whole. What
    can be refused is, by config.json and the headers, before any tensor is read. The target appears at the end,
    complete; a run that is stopped leaves nothing that could be mistaken for it.

    Args:
        weights: as in `quantize_weights`; None chooses `int4` with the largest group of 128, 64 or 32 that divides the
            inputs of every layer, or another divisor of them if there is none.
        embeddings: as in `quantize_weights`.
        rules: as in `quantize_weights`.
        kv: scheme of the cache of keys and values that the packed model makes, as of `PTQConfig`; None for floats.
        device: as in `quantize_weights`.
        progress: as in `quantize_weights`.
        dtype: that what stays float is cast to, and that config.json asks for; None keeps both as they are.
        shard_bytes: largest tensor file, and what is held of the result in memory.

    Raises:
        ValueError: if the source is not a whole float model in safetensors or GGUF, the target is not empty, or as
            `quantize_weights`.
    """
    path = as_path(source, f"{WHO}: the source")
    if device is not None:
        as_device(device, WHO)
    refuse_dtype(dtype, WHO)
    scheme = None if kv is None else KVScheme.parse(kv, WHO)
    gguf = is_gguf(path)
    if weights is not None:
        check_schemes(weights, embeddings, rules)
    with whole_folder(target, WHO) as out:
        origin = _Gguf(path) if gguf else _Transformers(read_folder(path, WHO))
        notes = list(origin.notes)
        if scheme is not None:
            refuse_without_cache(origin.model, scheme, WHO)
        if weights is None:
            weights, own_rules, note = default_scheme(origin.model, embeddings, rules)
            rules = [*own_rules, *rules]
            notes.append(note)
        sites = weight_sites(origin.model, weights, embeddings, rules)
        parts = origin.parts(sites)
        stored = _stored_names(sites, origin.names, parts, path)
        origin.check()
        plan = _Planned(origin.model, sites)
        writer = ShardWriter(out, shard_bytes)
        formats: dict[str, PackedFormat] = {}
        held: dict[str, dict[str, Tensor]] = {}  # of experts, until all that make a stack are there
        for name, tensor in origin.tensors(progress):
            site = stored.get(name)
            if site is None or site.scheme is None:
                writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
                continue
            own = parts.get(site.names[0])
            if own is not None:
                waiting = held.setdefault(site.names[0], {})
                waiting[name] = tensor
                if len(waiting) < len(own):
                    continue
                del held[site.names[0]]
                tensor = put_together(origin.model, site.names[0], {part: waiting[part] for part in own})
            if site.names[0] not in formats:
                formats[site.names[0]] = _pack(writer, site, tensor, device)
        writer.close()
        rows = [site_row(site, formats.get(site.names[0])) for site in sites]
        settings = settings_of(weights, embeddings, rules, None if scheme is None else str(scheme))
        packed = to_config(rows, settings, writer.hashes)
        config = {**origin.config, "quantization_config": packed}
        if dtype is not None:
            config = {**config, "dtype": str(dtype).removeprefix("torch.")}
            config.pop("torch_dtype", None)
        (out / "config.json").write_text(json.dumps(config, indent=2))
        origin.write_companions(out)
    done = plan.done(rows, formats)
    return QuantizeResult(
        Path(target),
        len(formats),
        len(done.kept()),
        origin.nbytes,
        writer.nbytes,
        str(Scheme.parse(weights, "weight")),
        done,
        tuple(notes),
        plan.numbers,
    )


def default_scheme(
    model: nn.Module, embeddings: str | Scheme | None, rules: Sequence[WeightRule]
) -> tuple[str, list[WeightRule], str]:
    """Chooses the scheme of the weights if none is given, rules for layers that it does not fit, and a note on both.

    Raises:
        ValueError: as `weight_sites`.
    """
    given = {site.names[0]: site.scheme for site in weight_sites(model, WHOLE_ROWS, embeddings, rules)}
    sites = [site for site in weight_sites(model, "int4@channel:asym", embeddings, rules) if site.scheme is not None]
    widths: dict[str, int] = {}
    for site in sites:
        if given[site.names[0]] != site.scheme:  # it follows the default, so no rule
            weight: Any = site.layer.weight
            widths[site.names[0]] = matrix_of(site.layer, weight).shape[1]
    for odd in (  # layers that get whole rows, the fewest that leave a group for the others
        [],
        [name for name, width in widths.items() if width < SMALLEST_GROUP],
        [name for name, width in widths.items() if width % SMALLEST_GROUP],
    ):
        common = math.gcd(*(width for name, width in widths.items() if name not in odd))
        sizes = [size for size in (128, 64, 32) if common % size == 0]
        sizes += [size for size in range(min(128, common), SMALLEST_GROUP - 1, -1) if common % size == 0]
        if sizes and len(odd) < max(1, len(widths)):
            break
    else:
        note = "since no group divides the inputs of every layer; --weights takes another"
        return WHOLE_ROWS, [], f"{WHOLE_ROWS}, {note}"
    scheme = f"int4@group:{sizes[0]}"
    note = f"{scheme}, {'the largest of 128, 64 and 32' if sizes[0] in (128, 64, 32) else 'the largest'} that divides"
    note += " the inputs of every layer"
    if odd:
        note += f" but {len(odd)} as {odd[0]}, which get {WHOLE_ROWS}"
    return scheme, [(name, WHOLE_ROWS) for name in odd], f"{note}; --weights takes another"


class _Planned:
    """Holds what is known of a model's weights before they are packed."""

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        self.model = model
        self.others = other_weights(model, [site_row(site, None) for site in sites])
        self.numbers = {site.names[0]: site.layer.weight.numel() for site in sites}  # type: ignore[union-attr,operator]
        for row in self.others:
            self.numbers[row.site] = (
                parameters[row.site].numel()
                if row.site in parameters
                else sum(p.numel() for p in modules[row.site].parameters() if p.dim() > 1)
            )

    def done(self, rows: Sequence[PlanRow], formats: Mapping[str, PackedFormat]) -> Plan:
        totals = totals_of(self.model, {name: format.nbytes for name, format in formats.items()})
        return Plan(WHO, "", (*rows, *self.others), (), totals)


class _Transformers:
    """Reads a Transformers folder: its model without data, its tensors one at a time."""

    notes: Sequence[str] = ()

    def __init__(self, folder: Folder) -> None:
        self.folder, self.config, self.names = folder, folder.config, set(folder.tensors)
        settings = settings_of_folder(folder, WHO)
        if settings is not None:
            todo = "import it with golden-stick import" if settings.method in FOREIGN else "give the float model"
            raise ValueError(
                f"{WHO}: {folder.path} must be a float model, got one with quant_method {settings.method!r}, as "
                f"{settings.where.removeprefix(f'{WHO}: ')} says; rounding twice loses more, so {todo}"
            )
        self.headers = folder.headers(WHO)
        self.nbytes = nbytes_of(self.headers.values())
        self.model = skeleton(folder.path, WHO)
        self.fit = fit(self.model, self.headers)
        replace(self.fit, missing=(), unused=()).refuse(WHO, folder.path, self.model)

    def parts(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Returns name of a stack of experts -> the tensors that it is put together of."""
        stacks = {site.names[0] for site in sites if isinstance(site.layer, ExpertStack)}
        sources = sources_of(self.model, self.names) if stacks else {}
        return {name: own for name, own in sources.items() if name in stacks}

    def check(self) -> None:
        """Raises unless the folder holds every tensor of the model and no other."""
        self.fit.refuse(WHO, self.folder.path, self.model)
        with opened_all(self.folder, WHO) as get:
            check_ties(self.model, self.folder, get, WHO)

    def tensors(self, progress: bool) -> Iterator[tuple[str, Tensor]]:
        items = list(self.folder.tensors.items())
        current: Path | None = None
        with ExitStack() as stack:
            for name, file in progress_bar(items, "packing") if progress else items:
                if file != current:
                    stack.close()
                    data, current = stack.enter_context(opened(file, WHO)), file
                yield name, data.get_tensor(name)

    def write_companions(self, out: Path) -> None:
        for file in self.folder.companions():
            shutil.copyfile(file, out / file.name)


class _Gguf:
    """Reads a GGUF file: its model without data, until its tensors are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, header = gguf_skeleton(path)
        self.nbytes, self.notes = header.nbytes, []
        self.config: dict[str, Any] = {}
        if header.kinds:
            self.notes.append(
                f"{path} holds {', '.join(header.kinds)} already, so its weights are rounded a second time; "
                "a float model gives a better one"
            )
        self.names = set(self.model.state_dict())

    def parts(self, sites: Sequence[Site]) -> dict[str, list[str]]:
        """Returns the stacks of experts, which Transformers has put together."""
        return {name: [name] for site in sites if isinstance(site.layer, ExpertStack) for name in site.names}

    def check(self) -> None:
        """Does nothing: Transformers checks a GGUF file when it reads it."""

    def tensors(self, progress: bool) -> Iterator[tuple[str, Tensor]]:
        model, self.tokenizer = load_gguf(self.path)
        self.generation = model.generation_config
        config = model.config.to_diff_dict()
        config.pop("quantization_config", None)
        self.config = {**config, "architectures": [type(model).__name__], "dtype": "float32"}
        tied = model.all_tied_weights_keys
        if tied != self.model.all_tied_weights_keys:  # type: ignore[comparison-overlap]
            raise ValueError(f"{WHO}: {self.path} must tie what its header says, got tensors for both; it is damaged")
        items = [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]
        yield from progress_bar(items, "packing") if progress else items

    def write_companions(self, out: Path) -> None:
        self.tokenizer.save_pretrained(out)
        self.generation.save_pretrained(out)


def _stored_names(
    sites: list[Site], names: set[str], parts: Mapping[str, Sequence[str]], path: Path
) -> dict[str, Site]:
    """Returns tensor name -> the site whose weight it is.

    Raises:
        ValueError: if the weight of a layer to pack is not among the names.
    """
    stacks = {name: site for site in sites if isinstance(site.layer, ExpertStack) for name in site.names}
    layers = [site for site in sites if not isinstance(site.layer, ExpertStack)]
    lost = [site for site in layers if site.scheme is not None and not any(f"{n}.weight" in names for n in site.names)]
    if lost:
        other = [part for part in sorted(FOREIGN_PARTS) if f"{lost[0].names[0]}.{part}" in names]
        if other:
            raise ValueError(
                f"{WHO}: {path} must be a float model, got {lost[0].names[0]}.{other[0]}: it is quantized already, and "
                "no quantization_config says how; find the config that belongs to it, then golden-stick import"
            )
        raise ValueError(
            f"{WHO}: {path} must hold {lost[0].names[0]}.weight, got no tensor of that name ({len(lost)} such layers); "
            "load the model with transformers and save_pretrained it, which renames tensors to those of the model"
        )
    stored = {f"{name}.weight": site for site in layers for name in site.names}
    return {**stored, **{part: site for name, site in stacks.items() for part in parts.get(name, ())}}


def _pack(writer: ShardWriter, site: Site, tensor: Tensor, device: torch.device | str | None) -> PackedFormat:
    assert site.scheme is not None
    shape = tuple(site.layer.weight.shape)  # type: ignore[union-attr,arg-type]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{WHO}: {site.names[0]}.weight must be {list(shape)} as config.json says, got {list(tensor.shape)}"
        )
    try:
        packed = rounded(site.layer, tensor if device is None else tensor.to(device), site.scheme)
    except ValueError as error:
        raise ValueError(f"{error} in {site.names[0]}.weight") from error
    for part, value in to_tensors(packed)[0].items():
        writer.add(f"{site.names[0]}.{part}", value)
    return PackedFormat.of(packed)
