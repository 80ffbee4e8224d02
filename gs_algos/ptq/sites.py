"""Decides which layers of a model `quantize_weights` packs, and by which scheme; it changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gs_algos.core.algorithm import history
from gs_algos.core.layer_rules import RulePattern, resolve
from gs_algos.core.modules import owner_of, parameter_owners
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import PlanRow, other_weights
from gs_algos.quant.packed.experts import ExpertStack, is_experts, stacks_of
from gs_algos.quant.packed.grid import group_size
from gs_algos.quant.packed.packable import CONVS, base_of, is_conv1d, matrix_of, why_not
from gs_algos.quant.packed.round_to_nearest import packable
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import PerChannel
from gs_kernels.pack.layouts import BITS

WHO = "quantize_weights"
UNTOUCHED = ""  # the option of a layer that no rule sets
SMALLEST_GROUP = 16  # that is worth a suggestion
FEW = 4  # layers that a message names
WeightRule: TypeAlias = tuple[RulePattern, str | Scheme | Mapping[str, Any] | None]


@dataclass(frozen=True)
class Site:
    """Describes one weight to pack or to keep. names: the layers that use it, its owner first; several if tied."""

    names: tuple[str, ...]
    layer: nn.Module
    scheme: Scheme | None
    reason: str = ""

    @property
    def kind(self) -> str:
        return self.layer.kind if isinstance(self.layer, ExpertStack) else type(self.layer).__name__


@dataclass(frozen=True)
class _SharedWeight:
    """Holds the layer that owns a weight, and the names of all that use it. reason: why it cannot be packed, or ""."""

    layer: nn.Module
    names: list[str]
    reason: str


def weight_sites(
    model: nn.Module,
    weights: str | Scheme,
    embeddings: str | Scheme | None,
    rules: Sequence[WeightRule],
    who: str = WHO,
    widths: Sequence[int] = BITS,
) -> list[Site]:
    """Lists every linear, convolution and embedding with its scheme, or with None and the reason why it stays float.

    Layers that share one weight are one site, and a rule on any of their names is for all of them; a linear that is
    tied to an embedding counts as the embedding.

    widths: bits that a scheme may have.

    Raises:
        ValueError: if a scheme cannot be packed, a rule matches nothing, tied layers are given different schemes, a
            group does not divide a layer, a layer has no shape yet, or nothing is left to pack.
    """
    defaults, chosen = check_schemes(weights, embeddings, rules, who, widths)
    for name, module in model.named_modules():
        if any(map(is_lazy, module._parameters.values())):
            kind, where = type(module).__name__, name or "the root"
            raise ValueError(f"{who}: every layer must know its shape, got {kind} at {where}; run the model once first")
    tied = _shared_weights(model, who)
    layers = {name: weight.layer for weight in tied for name in weight.names}
    if embeddings is not None and not any(isinstance(weight.layer, nn.Embedding) for weight in tied):
        raise ValueError(f"{who}: embeddings={str(embeddings)!r} needs a nn.Embedding, got a model without one")
    others = other_weights(model, [PlanRow(name, "", "keep") for name in layers])  # which a rule may name, too
    nameable = {row.site: owner_of(model, row.site) for row in others}
    ruled = resolve(chosen, {**nameable, **layers}, {"weight": UNTOUCHED}, who)
    sites = [
        _site(w, ruled, defaults[nn.Embedding if isinstance(w.layer, nn.Embedding) else nn.Linear], who) for w in tied
    ]
    _refuse_groups([site for site in sites if site.scheme is not None], who)
    if not any(site.scheme is not None for site in sites):
        why = _counted([*(site.reason for site in sites), *(row.reason for row in others)])
        raise ValueError(
            f"{who}: at least one layer must be left to pack, got {len(sites)} layers that are all kept: {why}"
        )
    return sites


def check_schemes(
    weights: str | Scheme,
    embeddings: str | Scheme | None,
    rules: Sequence[WeightRule],
    who: str = WHO,
    widths: Sequence[int] = BITS,
) -> tuple[dict[type[nn.Module], Scheme | None], list[tuple[RulePattern, Any]]]:
    """Parses the schemes of a call: returns the default of each class of layer, and the rules as `resolve` takes them.

    Raises:
        ValueError: if a scheme cannot be packed.
    """
    parsed: Callable[[str | Scheme], Scheme] = partial(packable, widths=widths, who=who)
    defaults = {nn.Linear: parsed(weights), nn.Embedding: None if embeddings is None else parsed(embeddings)}
    pairs = [isinstance(rule, tuple | list) and len(rule) == 2 for rule in rules]  # `resolve` refuses other kinds
    chosen = [(r[0], _options(r[1], parsed)) if pair else r for r, pair in zip(rules, pairs, strict=True)]
    return defaults, chosen


def _counted(reasons: Iterable[str]) -> str:
    return "; ".join(f"{reason} ({n})" for reason, n in Counter(reasons).items())


def _shared_weights(model: nn.Module, who: str) -> list[_SharedWeight]:
    """Lists the weights of all linears, convolutions, embeddings and experts, each once, with all that use it."""
    members: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if base_of(module) is not None:
            members.setdefault(_memory_key(module), []).append((name, module))
        elif is_experts(module):
            for part in stacks_of(module):
                stack = ExpertStack(module, part)
                members.setdefault(_memory_key(stack), []).append((f"{name}.{part}" if name else part, stack))
    if not members:
        why = _counted(row.reason for row in other_weights(model, []))
        done = ", ".join(entry["algorithm"] for entry in history(model))
        raise ValueError(
            f"{who}: the model must have a nn.Linear or nn.Embedding, got {type(model).__name__} without, "
            "and without a convolution"
            + (f"; what it has {why}" if why else "")
            + (f"; {done} quantized its layers already" if done else "")
        )
    owners = parameter_owners(model)
    shared = []
    for layers in members.values():
        layers.sort(key=lambda pair: not isinstance(pair[1], nn.Embedding))
        reason = _why_kept(model, layers, owners)
        shared.append(_SharedWeight(layers[0][1], [name for name, _ in layers], reason))
    return shared


def _memory_key(layer: nn.Module) -> Any:
    """Returns a key that is equal for layers whose weights are the same memory, in one parameter or several."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return id(layer)
    if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta and weight.numel():
        return weight.device, weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype
    return id(weight)


def _why_kept(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], owners: Mapping[int, Sequence[str]]) -> str:
    """Says why layers that share one weight cannot be packed; "" if they can."""
    first = layers[0][0]
    names = {name for name, _ in layers}
    for name, layer in layers:
        if name == "":
            return "is the model itself, which cannot be replaced in place; put it into a nn.Sequential"
        if reason := why_not(layer):
            return reason if name == first else f"its weight is also that of {name}: {reason}"
        stack = isinstance(layer, ExpertStack)
        if stack and "." not in name:
            return "is held by the model itself, which cannot be replaced in place; put it into a nn.Sequential"
        if is_compiled(model, name.rpartition(".")[0] if stack else name):
            return "is wrapped by torch.compile, which calls the float layer; compile after packing"
        full_names = owners.get(id(layer._parameters["weight"]), ())
        used = set(full_names) if stack else {full.rpartition(".")[0] for full in full_names}
        if others := sorted(used - names):
            return f"its weight is also used by {', '.join(others)}, which is no such layer"
    if len({_row_layout(layer) for _, layer in layers}) > 1:
        return f"its weight is shared by layers that read it in different ways: {', '.join(sorted(names))}"
    return ""


def _row_layout(layer: nn.Module) -> str:
    """Tells how a layer reads its weight: as filters, as rows, or transposed."""
    return "filters" if isinstance(layer, CONVS) else "columns" if is_conv1d(layer) else "rows"


def _options(weight: str | Scheme | Mapping[str, Any] | None, parsed: Callable[[str | Scheme], Scheme]) -> Any:
    """Returns a rule's options as `resolve` takes them."""
    if weight is None:
        return None
    options = dict(weight) if isinstance(weight, Mapping) else {"weight": weight}
    return {key: str(parsed(value)) if key == "weight" else value for key, value in options.items()}


def _site(weight: _SharedWeight, ruled: dict[str, Any], default: Scheme | None, who: str) -> Site:
    names = weight.names
    given = [ruled[name] for name in names if ruled[name] != {"weight": UNTOUCHED}]
    if any(options != given[0] for options in given):
        texts = " and ".join("None" if options is None else options["weight"] for options in given)
        raise ValueError(f"{who}: {' and '.join(names)} share one weight and must get one scheme, got {texts}")
    if given:
        scheme, reason = None if given[0] is None else Scheme.parse(given[0]["weight"], "weight"), "kept by a rule"
    else:
        scheme, reason = default, "embeddings are kept"
    if scheme is not None and weight.reason:
        return Site(tuple(names), weight.layer, None, weight.reason)
    return Site(tuple(names), weight.layer, scheme, "" if scheme is not None else reason)


def _refuse_groups(sites: list[Site], who: str) -> None:
    """Raises if a scheme's group does not divide the rows of its layer, with every layer counted and a way out."""
    bad: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        assert site.scheme is not None
        weight: Any = site.layer.weight
        shape = tuple(matrix_of(site.layer, weight).shape)
        try:
            n_scales(site.scheme.granularity, shape)
        except ValueError:
            bad.setdefault((str(site.scheme), shape[1], group_size(site.scheme, shape[1])), []).append(site)
    if not bad:
        return
    (scheme, k, size), (first, *_) = next(iter(bad.items()))
    every = [site for group in bad.values() for site in group]
    what = "weights of a filter" if isinstance(first.layer, CONVS) else "inputs"
    fits = math.gcd(k, size)
    if every[0].scheme is not None and every[0].scheme.is_float:
        raise ValueError(
            f"{who}: groups of {size} must divide the {k} {what} of {first.names[0]}, got {scheme} ({len(every)} such "
            f"layers); give these layers integers by a rule: rules=[{_rule_for(every)!r}]"
        )
    way = f"group:{fits} or channel" if fits >= SMALLEST_GROUP else "channel"
    raise ValueError(
        f"{who}: the group must divide the {k} {what} of {first.names[0]}, got {scheme} ({len(every)} such layers); "
        f"use {way}, for all or by a rule for these layers: rules=[{_rule_for(every)!r}]"
    )


def some_of(names: Sequence[str]) -> str:
    """Lists the first of some layers, for a message."""
    return ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")


def _rule_for(sites: list[Site]) -> tuple[str, str]:
    """Makes one rule that gives all of these layers a scale a row."""
    names = [site.names[0] for site in sites]
    ends = sorted({name.rpartition(".")[2] for name in names})
    pattern = names[0] if len(names) == 1 else f"re:{'|'.join(names)}" if len(names) <= FEW else ""
    pattern = pattern or f"re:(.*\\.)?({'|'.join(ends)})"
    scheme = sites[0].scheme
    assert scheme is not None
    return pattern, "int8@channel" if scheme.is_float else str(replace(scheme, granularity=PerChannel(0)))
