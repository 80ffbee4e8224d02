"""Weight-only compression without data: weights rounded to nearest and packed, layer by layer, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gs_algos.core.algorithm import history, remember
from gs_algos.core.modules import get_module, set_module
from gs_algos.core.network import network_of
from gs_algos.core.plan import PlanRow, other_weights, render_layers
from gs_algos.core.progress import progress as progress_bar
from gs_algos.ptq.sites import WHO, Site, WeightRule, weight_sites
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.packed import Packed, PackedFormat
from gs_algos.quant.packed_embedding import PackedEmbedding
from gs_algos.quant.packed_linear import PackedLinear
from gs_algos.quant.rounding import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight

NAME = "quantize_weights"


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

    Of a wrapper of torch.compile or DistributedDataParallel the network inside is packed and returned.

    A layer's float weight is freed before the next one is packed, so the peak is one layer above the float model.

    Args:
        weights: scheme of every `nn.Linear`, with 1, 2, 4 or 8 bits: `int8@channel`, `int4@group:64:mse`,
            `int4@group:128:asym`, ...
        embeddings: scheme of every `nn.Embedding`, and of the linears tied to one; None leaves them float.
        rules: (pattern, scheme) or (pattern, None) to leave layers float; as everywhere, last wins:
            `[("lm_head", "int8@group:64"), ("re:.*down_proj", None)]`.
        device: where the rounding is done, e.g. "cuda"; the packed layer goes back to where the float one was.
        progress: show a bar on a terminal.

    Raises:
        ValueError: as `weight_sites`; or if a weight has no data, or is NaN or Inf.
    """
    model = network_of(model, WHO)
    sites: list[Any] = weight_sites(model, weights, embeddings, rules)
    if any(entry["algorithm"] == NAME for entry in history(model)):
        raise RuntimeError(f"{WHO}: the model must not be packed yet, got one that is; build it anew")
    for site in sites:
        _refuse_values(site)
    rows = []
    numbers = range(len(sites))
    for i in progress_bar(numbers, "packing") if progress else numbers:
        site, sites[i] = sites[i], None  # a site holds its float layer, which is to be freed
        rows.append(site_row(site, None if site.scheme is None else pack_site(model, site, device)))
    leave_fast_path(model)
    rows += other_weights(model, rows)
    config = settings_of(weights, embeddings, rules)
    plan = [row.__dict__ for row in rows]
    remember(model, {"algorithm": NAME, "stage": "converted", "steps": 0, "config": config, "plan": plan})
    return model


def _refuse_values(site: Site) -> None:
    """Raises if the weight of a site cannot be rounded: found before any layer is packed."""
    weight: Any = site.layer.weight
    if weight.is_meta:
        raise ValueError(f"{WHO}: {site.names[0]}.weight must have data, got a meta tensor; use quantize_checkpoint")
    if site.scheme is not None and not bool(weight.isfinite().all()):
        raise ValueError(f"{WHO}: {site.names[0]}.weight must be finite, got NaN or Inf")


def pack_site(model: nn.Module, site: Site, device: torch.device | str | None = None) -> PackedFormat:
    """Replaces the layers of one site by packed ones."""
    assert site.scheme is not None
    weight: Any = site.layer.weight
    packed = round_to_nearest(weight if device is None else weight.to(device), site.scheme).to(weight.device)
    install(model, site.names, packed)
    return PackedFormat.of(packed)


def site_row(site: Site, format: PackedFormat | None) -> PlanRow:
    """The line of the plan, and all that `restore` needs."""
    if site.scheme is None or format is None:
        return PlanRow(site.names[0], site.kind, "keep", reason=site.reason)
    settings = {"weight": str(site.scheme), "names": list(site.names), "format": format.to_dict()}
    return PlanRow(site.names[0], site.kind, "pack", str(site.scheme), settings=settings)


def install(model: nn.Module, names: Iterable[str], weight: PackedWeight) -> None:
    """Puts packed layers in place of the live ones of these names, which then share `weight`; the first owns it."""
    owner: Packed | None = None
    for name in names:
        old: Any = get_module(model, name)
        held = weight if owner is None else owner
        if tuple(old.weight.shape) != weight.shape:
            raise ValueError(
                f"quantize_weights: {name}.weight must be {list(weight.shape)}, got {list(old.weight.shape)}"
            )
        dtype = old.weight.dtype
        new: Packed
        if isinstance(old, nn.Embedding):
            new = PackedEmbedding(held, old.padding_idx, dtype)
        else:
            new = PackedLinear(held, old.bias, dtype)
        set_module(model, name, new)
        owner = owner or new


def summary(model: nn.Module) -> str:
    """A table of the packed layers of a model, and what stays float."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    rows = []
    for name, module in packed.items():
        shape = "x".join(map(str, module.shape))
        rows.append((name, shape, module.bits, module.group_size, "tied" if module.tied else f"{module.nbytes:,}"))
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    total = sum(module.nbytes for module in packed.values())
    table = render_layers(("layer", "shape", "bits", "group", "bytes"), rows)
    return f"{table}\n{len(packed)} packed layers, {total:,} bytes; {kept:,} bytes of float parameters"


class QuantizedWeights:
    """How `load` gives a freshly built float model the structure that `quantize_weights` gave another."""

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        for row in entry["plan"]:
            if row["action"] == "keep":
                continue
            settings = row["settings"]
            device = get_module(model, row["site"]).weight.device
            install(model, settings["names"], PackedFormat.from_dict(settings["format"]).empty(device))  # type: ignore[arg-type]
        leave_fast_path(model)
        return model


def settings_of(weights: str | Scheme, embeddings: str | Scheme | None, rules: Sequence[WeightRule]) -> dict[str, Any]:
    """The arguments of `quantize_weights` as plain JSON values."""

    def plain(options: Any) -> Any:
        return dict(options) if isinstance(options, Mapping) else None if options is None else str(options)

    return {
        "weights": str(Scheme.parse(weights, "weight")),
        "embeddings": None if embeddings is None else str(Scheme.parse(embeddings, "weight")),
        "rules": [[p if isinstance(p, str) else f"type:{p.__name__}", plain(v)] for p, v in rules],
    }
