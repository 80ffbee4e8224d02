"""Gives layers the packed forms that a latency table names: weights alone, or with inputs on a grid of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs
from gs_algos.core.modules import get_module
from gs_algos.ptq.weights import install
from gs_algos.qat.simqat import SimQAT
from gs_algos.quant.packed.grid import stored_bits
from gs_algos.quant.packed.linear import TOKEN
from gs_algos.quant.packed.packable import in_rows, matrix_of, packed_like, why_not
from gs_algos.quant.packed.round_to_nearest import packable, round_to_nearest
from gs_algos.quant.scheme import Scheme, of_integers
from gs_kernels import PackedWeight

WHO = "latency_table"
FLOAT = "float"


def parse(choice: str) -> tuple[Scheme, str | None]:
    """Returns the scheme of the weight, and that of the inputs or None.

    Raises:
        ValueError: if the text is no choice.
    """
    if not isinstance(choice, str):
        raise TypeError(f"{WHO}: a choice must be text such as 'int8@channel/int8@tensor', got {choice!r}")
    weight, _, act = choice.partition("/")
    if not act or act == TOKEN:
        return packable(weight, who=WHO), act or None
    return of_integers(weight, WHO), str(Scheme.parse(act, "act"))


def as_run(choice: str) -> tuple[Scheme, Scheme | str]:
    """Returns a choice in the widths that its codes are stored and multiplied in, without how its ranges are found."""
    weight, _, act = choice.partition("/")
    scheme = Scheme.parse(weight, "weight")
    return _plain(scheme, stored_bits(scheme)), act if act in ("", TOKEN) else _plain(Scheme.parse(act, "act"), 8)


def _plain(scheme: Scheme, bits: int) -> Scheme:
    if scheme.is_float:
        return replace(scheme, observer="minmax")
    form = replace(scheme.integers, bits=bits, narrow=False)
    return replace(scheme, format=form, observer="minmax", argument=None, learned=False)


def on_grid(choice: str) -> bool:
    """Says whether inputs are rounded on a fixed grid, so that the layer in front can hand on codes."""
    return parse(choice)[1] not in (None, TOKEN)


def packed_weight(layer: nn.Module, scheme: Scheme, act: str | None) -> PackedWeight:
    if act is not None and type(layer) is not nn.Linear:
        raise ValueError(f"{act} is for linears")
    weight: Any = layer.weight
    return in_rows(layer, round_to_nearest(matrix_of(layer, weight.detach()), scheme))


def in_form(layer: nn.Module, x: Tensor, choice: str) -> nn.Module:
    """Returns a layer in the form of a choice.

    Raises:
        ValueError, RuntimeError: if it cannot have it.
    """
    if choice == FLOAT:
        return layer
    scheme, act = parse(choice)
    if act in (None, TOKEN):
        reason = why_not(layer)
        if reason:
            raise ValueError(reason)
        return packed_like(layer, packed_weight(layer, scheme, act), act)
    algo = SimQAT(weight=scheme, act=act)
    alone = algo.apply(nn.Sequential(copy.deepcopy(layer)), x)
    algo.calibrate(alone, [x])
    return algo.convert(alone, x).eval()


def in_forms(net: nn.Module, policy: Mapping[str, str], inputs: Inputs) -> nn.Module:
    """Returns a copy of the network with each layer in the form that a policy gives it."""
    new = copy.deepcopy(net)
    parsed = {name: parse(choice) for name, choice in policy.items() if choice != FLOAT}
    static = {name: (str(w), act) for name, (w, act) in parsed.items() if on_grid(policy[name])}
    if static:
        rules = [("re:.*", None), *((name, {"weight": w, "act": act}) for name, (w, act) in static.items())]
        algo = SimQAT(rules=rules)
        new = algo.apply(new, inputs)
        algo.calibrate(new, [inputs])
        new = algo.convert(new, inputs)
    for name, (scheme, act) in parsed.items():
        if name not in static:
            install(new, [name], packed_weight(get_module(new, name), scheme, act), act)
    return new.eval()
