"""Counts what a network takes once it is compressed as a policy says: bytes, parameters, multiply-adds, bits, ms.

Prune rates multiply: a weight loses the outputs of its own group and the inputs of the one in front. So the costs of a
network with such knobs are no sums over knobs; those of schemes alone are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gs_algos.analysis.latency_table import LatencyTable
from gs_algos.analysis.operations import count_operations
from gs_algos.core.algorithm import Inputs
from gs_algos.core.modules import parameter_owners, parent_name
from gs_algos.ghost.planning import ghost_numbers, numbers_of
from gs_algos.pruning.budget import keep_count
from gs_algos.pruning.channel_groups.groups import FIXED
from gs_algos.quant.scheme import Scheme
from gs_algos.search.space import LayerCall, Setting
from gs_algos.search.target import FLOAT, GHOST_RATIO, Pruned, Target

FLOAT_BITS = 32


class Costs:
    """Counts each kind of cost. Times are those of a table, which need not be there.

    Args:
        network: the float one.
        inputs: of a forward whose multiply-adds are counted.
        calls: of `layer_calls`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        network: nn.Module,
        inputs: Inputs,
        calls: Mapping[str, LayerCall],
        latency: LatencyTable | None,
        who: str,
    ) -> None:
        self.who, self.latency, self.calls = who, latency, calls
        parameters = dict(network.named_parameters())
        self.itemsize = {name: p.element_size() for name, p in parameters.items()}
        self.shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        owners = {id(p): name for name, p in parameters.items()}
        modules = dict(network.named_modules(remove_duplicate=False))
        self.weight_of = {
            name: owners[id(m._parameters["weight"])]
            for name, m in modules.items()
            if id(m._parameters.get("weight")) in owners
        }
        self.shared = {parent_name(n) for own in parameter_owners(network).values() if len(own) > 1 for n in own}
        self.layers = modules
        self.rows = {row.site: (target, row) for target in targets for row in target.rows if target.pruned is None}
        self.whole_macs = count_operations(network, inputs, who).macs
        pruned = [target.pruned for target in targets if target.pruned is not None]
        self.cut = CutSizes(pruned[0], self.shapes) if pruned else None
        self._ghost = functools.lru_cache(maxsize=None)(self._one_ghost)
        self._nbytes = functools.lru_cache(maxsize=None)(self._packed_nbytes)

    def total(self, kind: str, setting: Setting) -> float:
        """Returns the cost of a network."""
        return float(getattr(self, f"_{kind}")(setting, self._shapes(setting)))

    def before(self, kind: str) -> float:
        """Returns the cost of the float network."""
        return self.total(kind, {})

    def weight_bytes(self, setting: Setting) -> float:
        """Returns the bytes of the weights that the setting names a scheme for."""
        shapes = self._shapes(setting)
        return sum(self._weight(site, str(scheme), shapes) for site, scheme in setting.get("weight", {}).items())

    def numbers(self, sites: Sequence[str]) -> int:
        """Counts the weights of layers."""
        return sum(math.prod(self.shapes[name]) for name in {self.weight_of[site] for site in sites})

    def _shapes(self, setting: Setting) -> Mapping[str, tuple[int, ...]]:
        rates = setting.get("rate", {})
        return self.shapes if self.cut is None or not rates else self.cut.shapes(rates)

    def _bytes(self, setting: Setting, shapes: Mapping[str, tuple[int, ...]]) -> float:
        taken = {self.weight_of[s]: self._weight(s, str(v), shapes) for s, v in setting.get("weight", {}).items()}
        rest = sum(math.prod(shape) * self.itemsize[name] for name, shape in shapes.items() if name not in taken)
        return rest + sum(taken.values()) + self._ghosts(setting).nbytes

    def _weight(self, site: str, scheme: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self._nbytes(site, scheme, shapes[self.weight_of[site]])

    def _packed_nbytes(self, site: str, scheme: str, shape: tuple[int, ...]) -> int:
        target, row = self.rows[site]
        return target.nbytes(row, self.layers[site], shape, scheme)

    def _params(self, setting: Setting, shapes: Mapping[str, tuple[int, ...]]) -> float:
        return sum(map(math.prod, shapes.values())) + self._ghosts(setting).numbers

    def _macs(self, setting: Setting, shapes: Mapping[str, tuple[int, ...]]) -> float:
        rates = setting.get("rate", {})
        whole = self.whole_macs if self.cut is None or not rates else self.cut.macs(rates)
        return whole + self._ghosts(setting).macs

    def _ghosts(self, setting: Setting) -> Change:
        """Returns what the ghost layers of a setting change."""
        found = Change()
        for site, ratio in setting.get(GHOST_RATIO, {}).items():
            if ratio != FLOAT:
                found = found.plus(self._ghost(site, int(ratio)))
        return found

    def _one_ghost(self, site: str, ratio: int) -> Change:
        conv, plan = self.layers[site], self.rows[site][1].settings
        before, after = numbers_of(conv, plan.norm is not None), ghost_numbers(conv, plan, ratio)
        numbers = after[0] + after[1] - before[0] - before[1]
        macs = self.calls[site].positions * (after[0] - before[0])
        return Change(macs, numbers, numbers * self.itemsize[self.weight_of[site]])

    def _bops(self, setting: Setting, shapes: Mapping[str, tuple[int, ...]]) -> float:
        total = self._macs(setting, shapes) * FLOAT_BITS**2
        for site, call in self.calls.items():
            weight, act = self._bits(site, setting)
            macs = call.positions * math.prod(shapes[self.weight_of[site]])
            total += macs * (weight * act - FLOAT_BITS**2)
        return total

    def _bits(self, site: str, setting: Setting) -> tuple[int, int]:
        scheme = setting.get("weight", {}).get(site, FLOAT)
        if scheme == FLOAT:
            return FLOAT_BITS, FLOAT_BITS
        act = self._act(site, setting)
        return _bits_of(str(scheme), "weight"), FLOAT_BITS if act is None else _bits_of(act, "act")

    def _act(self, site: str, setting: Setting) -> str | None:
        """Returns the scheme of what a layer reads."""
        chosen = setting.get("act", {}).get(site)
        if chosen is not None:
            return str(chosen)
        return getattr(self.rows[site][1].settings, "act", None) if site in self.rows else None

    def _latency(self, setting: Setting, shapes: Mapping[str, tuple[int, ...]]) -> float:
        assert self.latency is not None
        return self.latency.predict(self.forms(setting))

    def forms(self, setting: Setting) -> dict[str, str]:
        """Returns the choice of a latency table for each layer; one that shares its weight has none."""
        found = {}
        for site, scheme in setting.get("weight", {}).items():
            act = self._act(site, setting)
            if site not in self.shared:
                found[site] = FLOAT if scheme == FLOAT else f"{scheme}/{act}" if act else str(scheme)
        return found


def _bits_of(text: str, role: Any) -> int:
    """Returns the bits of a scheme, or of a grid of SLB."""
    return int(text.partition("bit")[0]) if text[0].isdigit() else Scheme.parse(text, role).bits


@dataclass(frozen=True)
class Change:
    """Holds what replaced layers add to a network; less than 0 where they save."""

    macs: float = 0.0
    numbers: int = 0
    nbytes: int = 0

    def plus(self, other: Change) -> Change:
        return Change(self.macs + other.macs, self.numbers + other.numbers, self.nbytes + other.nbytes)


class CutSizes:
    """Counts parameters and multiply-adds of a network that is cut at given rates, by the units that stay.

    The indices of a tensor that belong to units of one group are as many for each, so numbers of units are enough.
    """

    def __init__(self, pruned: Pruned, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.pruned, self._whole = pruned, dict(shapes)
        self.groups = pruned.groups.prunable()
        self._slices = [(p.tensor, p.dim, *self._counts(p.units)) for p in pruned.groups.slices if p.tensor in shapes]
        self._costs = [(macs, [self._counts(f) for f in factors]) for macs, factors in pruned.groups.costs]
        self._kept = functools.lru_cache(maxsize=None)(
            lambda place, rate: (
                keep_count(self.groups[place], rate, pruned.round_to, pruned.floor) / self.groups[place].n
            )
        )

    def _share(self, place: int, rate: float) -> float:
        """Returns the share of a group's units that stays at a rate."""
        group = self.groups[place]
        return keep_count(group, rate, self.pruned.round_to, self.pruned.floor) / group.n

    def _counts(self, units: Any) -> tuple[int, np.ndarray]:
        """Returns how many indices always stay, and how many belong to each group."""
        fixed = int((units == FIXED).sum())
        inside = [int(((units >= g.first) & (units < g.first + g.n)).sum()) for g in self.groups]
        return fixed, np.array(inside, dtype=np.float64)

    def shares(self, rates: Mapping[str, Any]) -> np.ndarray:
        """Returns the share of each group's units that stays."""
        return np.array([self._kept(i, float(rates.get(g.name, 0.0))) for i, g in enumerate(self.groups)])

    def shapes(self, rates: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        share, left = self.shares(rates), {name: list(shape) for name, shape in self._whole.items()}
        for tensor, dim, fixed, inside in self._slices:
            left[tensor][dim] = fixed + round(float(inside @ share))
        return {name: tuple(shape) for name, shape in left.items()}

    def macs(self, rates: Mapping[str, Any]) -> float:
        share, total = self.shares(rates), 0.0
        for whole, factors in self._costs:
            macs = float(whole)
            for fixed, inside in factors:
                size = fixed + float(inside.sum())
                macs *= (fixed + float(inside @ share)) / size if size else 1.0
            total += macs
        return total
