"""Which layers of a model get a packed weight, and of which scheme: decided before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from gs_algos.core.modules import parameter_owners
from gs_algos.core.rules import RulePattern, resolve
from gs_algos.quant.rounding import group_size, packable
from gs_algos.quant.scheme import Scheme, n_scales

WHO = "quantize_weights"
UNTOUCHED = ""  # the option of a layer that no rule sets
WeightRule: TypeAlias = tuple[RulePattern, str | Mapping[str, Any] | None]


@dataclass(frozen=True)
class Site:
    """One weight. names: the layers that use it, its owner first: more than one if they are tied."""

    names: tuple[str, ...]
    layer: nn.Module
    scheme: Scheme | None
    reason: str = ""

    @property
    def kind(self) -> str:
        return type(self.layer).__name__


def weight_sites(
    model: nn.Module, weights: str | Scheme, embeddings: str | Scheme | None, rules: Sequence[WeightRule]
) -> list[Site]:
    """Every `nn.Linear` and `nn.Embedding` with its scheme; None, with a reason, for those that stay float.

    Layers that share one weight are one site, and a rule on any of their names is for all of them; a linear that is
    tied to an embedding counts as the embedding.

    Raises:
        ValueError: if a scheme cannot be packed, a rule matches nothing, tied layers are given different schemes, a
            group does not divide a layer, or nothing is left to pack.
    """
    defaults, chosen = check_schemes(weights, embeddings, rules)
    tied = _tied(model)
    layers = {name: layer for layer, names in tied for name in names}
    if embeddings is not None and not any(isinstance(layer, nn.Embedding) for layer in layers.values()):
        raise ValueError(f"{WHO}: embeddings={str(embeddings)!r} needs a nn.Embedding, got a model without one")
    ruled = resolve(chosen, layers, {"weight": UNTOUCHED}, WHO)
    sites = [_site(layer, names, ruled, defaults[type(layer)]) for layer, names in tied]
    _refuse_groups([site for site in sites if site.scheme is not None])
    if not any(site.scheme is not None for site in sites):
        raise ValueError(f"{WHO}: at least one layer must be left to pack, got {len(sites)} layers that are all kept")
    return sites


def check_schemes(
    weights: str | Scheme, embeddings: str | Scheme | None, rules: Sequence[WeightRule]
) -> tuple[dict[type[nn.Module], Scheme | None], list[tuple[RulePattern, Any]]]:
    """(default of each class of layer, rules as `resolve` takes them), without a model.

    Raises:
        ValueError: if a scheme cannot be packed.
    """
    defaults = {nn.Linear: packable(weights), nn.Embedding: None if embeddings is None else packable(embeddings)}
    pairs = [isinstance(rule, tuple | list) and len(rule) == 2 for rule in rules]  # `resolve` refuses other kinds
    return defaults, [(rule[0], _options(rule[1])) if pair else rule for rule, pair in zip(rules, pairs, strict=True)]


def _tied(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """(layer that owns it, names of all layers) for each weight that only linears and embeddings use."""
    owners = parameter_owners(model)
    members: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            members.setdefault(id(module.weight), []).append((name, module))
    found = []
    for key, layers in members.items():
        if len(owners[key]) > len(layers):
            continue  # another kind of module computes with this very tensor
        layers.sort(key=lambda pair: type(pair[1]) is not nn.Embedding)
        found.append((layers[0][1], [name for name, _ in layers]))
    if not found:
        raise ValueError(f"{WHO}: the model must have a nn.Linear or nn.Embedding, got {type(model).__name__} without")
    return found


def _options(weight: str | Scheme | Mapping[str, Any] | None) -> Any:
    """A rule's options as `resolve` takes them."""
    if weight is None:
        return None
    options = dict(weight) if isinstance(weight, Mapping) else {"weight": weight}
    return {key: str(packable(value)) if key == "weight" else value for key, value in options.items()}


def _site(layer: Any, names: list[str], ruled: dict[str, Any], default: Scheme | None) -> Site:
    given = [ruled[name] for name in names if ruled[name] != {"weight": UNTOUCHED}]
    if any(options != given[0] for options in given):
        texts = " and ".join("None" if options is None else options["weight"] for options in given)
        raise ValueError(f"{WHO}: {' and '.join(names)} share one weight and must get one scheme, got {texts}")
    if given:
        scheme, reason = None if given[0] is None else packable(given[0]["weight"]), "kept by a rule"
    else:
        scheme, reason = default, "embeddings are kept"
    if scheme is not None and isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return Site(tuple(names), layer, None, "max_norm changes rows as they are read")
    return Site(tuple(names), layer, scheme, "" if scheme is not None else reason)


def _refuse_groups(sites: list[Site]) -> None:
    """Raises if a scheme's group does not divide the rows of its layer, with every layer counted and a way out."""
    bad: dict[tuple[str, int, int], list[str]] = {}
    for site in sites:
        assert site.scheme is not None
        shape = tuple(site.layer.weight.shape)  # type: ignore[union-attr,arg-type]
        try:
            n_scales(site.scheme.granularity, shape)
        except ValueError:
            bad.setdefault((str(site.scheme), shape[1], group_size(site.scheme, shape[1])), []).append(site.names[0])
    if not bad:
        return
    (scheme, k, size), names = next(iter(bad.items()))
    count = sum(map(len, bad.values()))
    raise ValueError(
        f"{WHO}: the group must divide the {k} inputs of {names[0]}, got {scheme} ({count} such layers); "
        f"use group:{math.gcd(k, size)} or channel, for all or by a rule for these layers"
    )
