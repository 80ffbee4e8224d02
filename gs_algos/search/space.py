"""Lists what can be chosen: a knob for each acting row of the plans, and what stays as the user's rules have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.layer_rules import Rule, rules_for
from gs_algos.core.modules import get_module
from gs_algos.core.network import ordinary_tensors
from gs_algos.quant.packed.packable import base_of
from gs_algos.quant.scheme import Scheme
from gs_algos.search.kinds import KINDS, Value
from gs_algos.search.target import FLOAT, Target

WIDE = 8  # bits of the first and the last layer
WIDEST: dict[Any, str] = {"weight": "int8@channel", "act": "int8@tensor"}  # of them, where no choice has 8 bits
Picks: TypeAlias = tuple[int, ...]  # for each knob the index of its value
Setting: TypeAlias = Mapping[str, Mapping[str, Value]]  # kind -> site -> value


@dataclass(frozen=True)
class Knob:
    """Names one thing that can be chosen.

    Args:
        site: the layer, or the first layer of a group of channels.
        kind: a key of `KINDS`.
        values: the one that leaves least of the network first.
        target: number of the algorithm whose rules set it.
    """

    site: str
    kind: str
    values: tuple[Value, ...]
    target: int = 0

    @property
    def name(self) -> str:
        return f"{self.site}:{self.kind}"


@dataclass(frozen=True)
class Space:
    """Holds the knobs.

    Args:
        knobs: in the order in which their layers run; those of one layer follow one another.
        fixed: kind -> site -> value of what has no choice: rules of the user, the first and the last layer.
        given: those of the fixed values that the search sets, by algorithm: kind -> site -> value.
        notes: what else there is to know.
    """

    knobs: tuple[Knob, ...]
    fixed: Setting
    given: tuple[Setting, ...]
    notes: tuple[str, ...] = ()

    def setting(self, picks: Picks) -> Setting:
        """Returns the value of everything, by kind and site."""
        found: dict[str, dict[str, Value]] = {kind: dict(self.fixed.get(kind, {})) for kind in KINDS}
        for knob, pick in zip(self.knobs, picks, strict=True):
            found[knob.kind][knob.site] = knob.values[pick]
        return found

    def rules(self, picks: Picks, target: int) -> tuple[Rule, ...]:
        """Returns the rules that give an algorithm these values."""
        rules: list[Rule] = []
        for kind in KINDS:
            chosen = dict(self.given[target].get(kind, {}))
            pairs = zip(self.knobs, picks, strict=True)
            chosen |= {k.site: k.values[i] for k, i in pairs if k.kind == kind and k.target == target}
            left = [site for site, value in chosen.items() if value == FLOAT]
            set_to: dict[str, Any] = {site: value for site, value in chosen.items() if value != FLOAT}
            rules += rules_for(set_to, KINDS[kind].option)
            rules += [(site, None) for site in left]
        return tuple(rules)


@dataclass(frozen=True)
class LayerCall:
    """Says how a layer runs. positions: outputs of one channel, over all samples; multiply-adds are that x weights."""

    site: str
    positions: int


def layer_calls(network: nn.Module, inputs: Inputs, who: str) -> dict[str, LayerCall]:
    """Returns each linear and convolution that runs, in the order of the first call."""
    found: dict[str, int] = defaultdict(int)

    def watch(name: str) -> Any:
        def after(layer: Any, args: Any, y: Any) -> None:
            found[name] += tensor_in(y).numel() // layer.weight.shape[0]

        return after

    with ExitStack() as stack, ordinary_tensors(), evaluating(network):
        for name, layer in network.named_modules():
            if base_of(layer) not in (None, nn.Embedding):
                stack.callback(layer.register_forward_hook(watch(name)).remove)
        run(network, inputs, who)
    return {name: LayerCall(name, positions) for name, positions in found.items()}


def make_space(
    targets: Sequence[Target],
    network: nn.Module,
    calls: Mapping[str, LayerCall],
    choices: Sequence[Value],
    acts: Sequence[str],
    who: str,
) -> Space:
    """Makes a knob for each acting row that no rule of the user is on; the first and the last layer get 8 bits.

    Raises:
        ValueError: if a choice is none, or no row has a knob.
    """
    offered = {kind: _choices(kind, acts if kind == "act" else choices, who) for kind in KINDS}
    fixed: dict[str, dict[str, Value]] = {kind: {} for kind in KINDS}
    given: list[dict[str, dict[str, Value]]] = [{kind: {} for kind in KINDS} for _ in targets]
    knobs: list[Knob] = []
    order = list(calls)
    ends = {order[0], order[-1]} if order else set()
    notes: list[str] = []
    for target in targets:
        for row in target.rows:
            layer = _layer(network, row.site)
            for kind in KINDS:
                own, values = target.own(row, kind), KINDS[kind].offer(target, row, layer, offered[kind])
                if not values or row.site in target.ruled.get(kind, ()):
                    if own is not None and (layer is not None or kind == "rate"):
                        fixed[kind][row.site] = own
                elif row.site in ends and kind in ("weight", "act"):
                    fixed[kind][row.site] = wide = _wide(values, kind, own)
                    if wide != own:
                        given[target.number][kind][row.site] = wide
                elif len(values) == 1:
                    fixed[kind][row.site] = given[target.number][kind][row.site] = values[0]
                    notes.append(f"{row.site} has one {kind} alone, {values[0]}, and no knob")
                else:
                    knobs.append(Knob(row.site, kind, tuple(values), target.number))
    if not knobs:
        names = ", ".join(target.algorithm.name for target in targets)
        raise ValueError(
            f"{who}: at least one layer must have a choice of values that no rule sets, got none in the plan of {names}"
        )
    place = {site: i for i, site in enumerate(order)}
    knobs.sort(key=lambda knob: place.get(knob.site, len(place)))
    return Space(tuple(knobs), fixed, tuple(given), tuple(notes))


def _choices(kind: str, choices: Sequence[Value], who: str) -> list[Value]:
    """Returns the choices of one kind, each once; its usual ones if there are none of it."""
    try:
        read = [KINDS[kind].read(choice) for choice in choices]
        read = read if any(value is not None for value in read) else [*map(KINDS[kind].read, KINDS[kind].default)]
    except (ValueError, TypeError) as error:
        raise type(error)(f"{who}: choices: {error}") from error
    return list(dict.fromkeys(value for value in read if value is not None))


def _wide(values: Sequence[Value], kind: str, own: Value | None) -> Value:
    """Returns the value of 8 bits, of the first and the last layer."""
    role: Any = kind
    fits = [v for v in values if v != FLOAT and Scheme.parse(str(v), role).bits == WIDE]
    if fits:
        return fits[-1]
    return own if kind == "act" and own is not None else str(Scheme.parse(WIDEST[role], role))


def _layer(network: nn.Module, site: str) -> Any:
    try:
        layer = get_module(network, site)
    except ValueError:
        return None
    return layer if isinstance(getattr(layer, "weight", None), Tensor) else None
