"""Rounds the weights of a model to nearest and packs them, layer by layer, in place; needs no data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from gs_algos.core.algorithm import Migration, history, refuse_prepared, remember
from gs_algos.core.arguments import as_device
from gs_algos.core.modules import get_module, set_module
from gs_algos.core.network import network_of, ordinary_tensors, without_autocast
from gs_algos.core.plan import Plan, PlanRow, other_weights, render_layers, rows_of, totals_of, with_settings
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.progress import progress as progress_bar
from gs_algos.ptq.sites import WHO, Site, WeightRule, some_of, weight_sites
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.packed.experts import ExpertStack, put_stack, stack_at
from gs_algos.quant.packed.module import Packed, PackedFormat
from gs_algos.quant.packed.packable import format_of, matrix_of, packed_like, rounded
from gs_algos.quant.packed.round_to_nearest import signs_of
from gs_algos.quant.rotation import checked_rotations, install_rotations, rotations_of
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight

logger = logging.getLogger(__name__)

NAME = "quantize_weights"
STOPPED = "packing stopped before it"


@dataclass(frozen=True)
class WeightPlan(RowSettings):
    """Describes one weight, of one layer or of several that share it.

    Args:
        names: the layers; the first owns the packed weight.
        weight: the scheme; None: it stays float.
        format: of the packed weight.
        act: scheme of the rows that the layers read, `int8@token`; None leaves them float.
    """

    form: ClassVar[str] = "weight"

    names: tuple[str, ...]
    weight: str | None = None
    format: PackedFormat | None = None
    act: str | None = None

    def other_names(self) -> tuple[str, ...]:
        return self.names[1:]


def from_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a history entry of a checkpoint of version 1 in the words of version 2."""
    return with_settings(entry, lambda row: {"form": WeightPlan.form, **row["settings"]} if row["settings"] else None)


def quantize_weights(
    model: nn.Module,
    weights: str | Scheme = "int4@group:128",
    *,
    embeddings: str | Scheme | None = None,
    rules: Sequence[WeightRule] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Packs the weights of the live model and returns it: no data, no training. `gs_algos.save` and `load` know it.

    Packed are `nn.Linear`, `nn.Conv1d` to `nn.Conv3d`, Conv1D of Transformers, the stacked experts of its mixtures, and
    if asked for `nn.Embedding`; what stays float is a row of `plan_weights`, with the reason. Hooks of a layer act on
    the packed one. Of a wrapper of torch.compile or DistributedDataParallel the network inside is packed and returned.

    A layer's float weight is freed before the next one is packed, so the peak is one layer above the float model.
    Whatever can be refused is refused before the first one.

    Args:
        weights: scheme of every linear and convolution, with 1, 2, 4 or 8 bits: `int8@channel`, `int4@group:64:mse`,
            `int4@group:128:asym`, ... A filter whose channels and taps take several groups is dequantized as it runs.
        embeddings: scheme of every `nn.Embedding`, and of the linears tied to one; None leaves them float.
        rules: (pattern, scheme) or (pattern, None) to leave layers float; as everywhere, last wins:
            `[("lm_head", "int8@group:64"), ("re:.*down_proj", None)]`.
        device: where the rounding is done, e.g. "cuda"; the packed layer goes back to where the float one was.
        progress: show a bar on a terminal.

    Raises:
        ValueError: as `weight_sites`; or if a weight has no data, or is NaN or Inf.
        RuntimeError: if the model is packed already, or is being trained by an algorithm; or if packing fails in the
            middle, e.g. for want of memory. The layers that were packed by then stay so, and the model's history says
            which; build the model anew to start over.
    """
    model = network_of(model, WHO)
    _refuse_history(model)
    if device is not None:
        as_device(device, WHO)
    with ordinary_tensors(), without_autocast(), torch.no_grad():
        sites = weight_sites(model, weights, embeddings, rules)
        for site in sites:
            _refuse_values(site)
        others = other_weights(model, [site_row(site, None) for site in sites])
        config = settings_of(weights, embeddings, rules)
        _pack_all(model, sites, others, config, device, progress)
    leave_fast_path(model)
    return model


def plan_weights(
    model: nn.Module,
    weights: str | Scheme = "int4@group:128",
    *,
    embeddings: str | Scheme | None = None,
    rules: Sequence[WeightRule] = (),
) -> Plan:
    """Lists what `quantize_weights` would do with the same arguments: every weight, its scheme or why it stays float.

    Touches nothing; the model may be on the meta device. It looks at every weight as `quantize_weights` does, since the
    dtype of the scales depends on the values, so with `:mse` it takes as long.

    Raises:
        ValueError: as `quantize_weights`.
        RuntimeError: if the model is packed already, or is being trained by an algorithm.
    """
    model = network_of(model, WHO)
    _refuse_history(model)
    with ordinary_tensors(), without_autocast(), torch.no_grad():
        sites = weight_sites(model, weights, embeddings, rules)
        rows, after = [], {}
        for site in sites:
            weight: Any = site.layer._parameters.get("weight")
            if site.scheme is not None and not weight.is_meta:
                _refuse_values(site)
            format = None if site.scheme is None else format_of(site.layer, weight, site.scheme)
            rows.append(site_row(site, format))
            if format is not None:
                after[site.names[0]] = format.nbytes
    rows += other_weights(model, rows)
    return Plan(NAME, "", tuple(rows), (), totals_of(model, after))


def _refuse_history(model: nn.Module) -> None:
    if any(entry["algorithm"] == NAME for entry in history(model)):
        raise RuntimeError(f"{WHO}: the model must not be packed yet, got one that is; build it anew")
    refuse_prepared(model, WHO)


def _refuse_values(site: Site) -> None:
    """Raises if the weight of a site cannot be rounded: found before any layer is packed."""
    if site.scheme is None:
        return
    weight: Any = site.layer.weight
    if weight.is_meta:
        raise ValueError(f"{WHO}: {site.names[0]}.weight must have data, got a meta tensor; use quantize_checkpoint")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{WHO}: {site.names[0]}.weight must be finite, got NaN or Inf")


def _pack_all(
    model: nn.Module,
    sites: list[Any],
    others: Sequence[PlanRow],
    config: dict[str, Any],
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """Packs site by site, and remembers what was done, also if it stops in the middle."""
    rows = [site_row(replace(site, scheme=None, reason=site.reason or STOPPED), None) for site in sites]
    count = sum(site.scheme is not None for site in sites)
    numbers = range(len(sites))
    try:
        for i in progress_bar(numbers, "packing") if progress else numbers:
            site, sites[i] = sites[i], None  # a site holds its float layer, which is to be freed
            if site.scheme is not None:
                rows[i] = site_row(site, pack_site(model, site, device))
    except BaseException as error:
        done = [row.site for row in rows if row.action == "pack"]
        if not done:
            raise
        where = next((row.site for row in rows if row.reason == STOPPED), "the end")
        text = (
            f"{WHO}: every layer must be packed, got {type(error).__name__} at {where}: {error}; "
            f"{len(done)} of {count} layers are packed already ({some_of(done)}): build the model anew to start over"
        )
        if isinstance(error, Exception):
            raise RuntimeError(text) from error
        logger.warning(text)
        raise
    finally:
        if any(row.action == "pack" for row in rows):
            plan = [row.to_dict() for row in (*rows, *others)]
            remember(model, {"algorithm": NAME, "stage": "converted", "steps": 0, "config": config, "plan": plan})


def pack_site(model: nn.Module, site: Site, device: torch.device | str | None = None) -> PackedFormat:
    """Replaces the layers of one site by packed ones."""
    assert site.scheme is not None
    weight: Any = site.layer.weight
    packed = rounded(site.layer, weight if device is None else weight.to(device), site.scheme).to(weight.device)
    install(model, site.names, packed)
    return PackedFormat.of(packed)


def site_row(site: Site, format: PackedFormat | None) -> PlanRow[WeightPlan]:
    """Makes the row of the plan, with all that `restore` needs."""
    if site.scheme is None or format is None:
        return PlanRow(site.names[0], site.kind, "keep", reason=site.reason, settings=WeightPlan(site.names))
    plan = WeightPlan(site.names, str(site.scheme), format)
    return PlanRow(site.names[0], site.kind, "pack", str(site.scheme), settings=plan)


def install(model: nn.Module, names: Iterable[str], weight: PackedWeight, act: str | None = None) -> None:
    """Puts packed layers in place of the live ones of these names, which then share `weight`; the first owns it.

    act: scheme of the rows that they read.
    """
    new: dict[str, Packed] = {}
    owner: Packed | None = None
    for name in names:
        old = layer_at(model, name)
        shape = tuple(matrix_of(old, old.weight).shape)
        if shape != weight.shape:
            raise ValueError(f"quantize_weights: {name}.weight must be {list(weight.shape)}, got {list(shape)}")
        if isinstance(old, ExpertStack):
            owner = put_stack(model, name, weight if owner is None else owner)
            continue
        new[name] = packed_like(old, weight if owner is None else owner, act)
        owner = owner or new[name]
    for name, layer in new.items():
        set_module(model, name, layer)


def layer_at(model: nn.Module, name: str) -> Any:
    """Returns the layer at a qualified name, or the stack of experts whose parameter has it."""
    return stack_at(model, name) or get_module(model, name)


def summary(model: nn.Module) -> str:
    """Returns a table of the packed layers of a model, and the bytes that stay float."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    rows = []
    for name, module in packed.items():
        filter = module.filter if isinstance(module, Convolution) else module.shape[1:]
        shape = "x".join(map(str, (module.shape[0], *filter)))
        rows.append((name, shape, module.bits, module.group_size, "tied" if module.tied else f"{module.nbytes:,}"))
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    total = sum(module.nbytes for module in packed.values())
    totals = f"{len(packed)} packed layers, {total:,} bytes; {kept:,} bytes of float parameters"
    return render_layers(("layer", "shape", "bits", "group", "bytes"), rows, below=[totals])


class QuantizedWeights:
    """Gives a freshly built float model the structure that `quantize_weights` gave another, for `load`."""

    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (WeightPlan,)
    migrations: ClassVar[Mapping[int, Migration]] = {1: from_version_1}

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        for row in rows_of(entry["plan"], cls.row_settings):
            if row.settings is not None and row.settings.format is not None:
                device: Any = layer_at(model, row.site).weight.device
                install(model, row.settings.names, row.settings.format.empty(device), row.settings.act)
                owner: Any = get_module(model, row.settings.names[0])
                owner.signs = signs_of(Scheme.parse(row.settings.weight, "weight"))
        restore_rotations(model, entry)
        leave_fast_path(model)
        return model


def rotated(model: nn.Module) -> dict[str, Any]:
    """Returns what a history entry says of a network that rotates as it runs; {} of another."""
    rotations = rotations_of(model)
    return {"rotations": rotations} if rotations else {}


def restore_rotations(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Gives a network the rotations that a history entry tells of."""
    install_rotations(model, checked_rotations(entry.get("rotations", {}), "load"))


def settings_of(
    weights: str | Scheme, embeddings: str | Scheme | None, rules: Sequence[WeightRule], kv: str | None = None
) -> dict[str, Any]:
    """Returns the arguments of `quantize_weights`, and the scheme of a cache, as plain JSON values."""

    def plain(options: Any) -> Any:
        return dict(options) if isinstance(options, Mapping) else None if options is None else str(options)

    return {
        "weights": str(Scheme.parse(weights, "weight")),
        "embeddings": None if embeddings is None else str(Scheme.parse(embeddings, "weight")),
        "rules": [[p if isinstance(p, str) else f"type:{p.__name__}", plain(v)] for p, v in rules],
        **({} if kv is None else {"kv": kv}),
    }
