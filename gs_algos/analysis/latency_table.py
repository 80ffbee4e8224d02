"""Measures how long each layer of a float network takes in each of our packed forms, and predicts networks from that.

A layer is timed alone, on inputs of the shape that it gets in the network; layers that are alike are timed once, and
what was measured on this machine with these versions is read again from a file. What lies between layers is fitted to
whole networks: those with one choice in all layers, and some with random ones.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gs_algos.analysis.between_layers import fit, shares
from gs_algos.analysis.layer_forms import FLOAT, WHO, as_run, in_forms, parse
from gs_algos.analysis.layer_timer import LayerTimer, TimeStore, calls_of
from gs_algos.core.algorithm import Inputs, evaluating, split_inputs
from gs_algos.core.batches import device_of, on_device, resized, samples_of
from gs_algos.core.machine import machine
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of, ordinary_tensors, without_autocast
from gs_algos.core.progress import progress
from gs_algos.core.table import Table
from gs_algos.core.timing import time_in_turns

CHOICES = ("int8@channel/int8@tensor", "int8@channel", "int4@channel", "int2@channel", "int1@channel")
POLICIES = 5  # random ones that are timed
FITTED = 4  # networks with random choices, for each choice, that what lies between layers is fitted to
FEW = 4  # names that a line lists
BAR = 0.1  # the median error of predictions beyond which they are not to be trusted


@dataclass(frozen=True)
class PolicyTime:
    """Holds the ms of a whole network with this policy: as the table predicts it, and measured."""

    policy: Mapping[str, str]
    predicted: float
    measured: float


@dataclass(frozen=True)
class LatencyTable:
    """Holds how long the layers of a network take. `str()` shows it.

    Args:
        total: ms of the float network.
        layers: layer -> choice -> ms of the layer alone, median; "float" is a choice of all.
        rest: choice -> ms between layers in the network whose layers all have it; below 0 where layers are faster in a
            network than alone, such as those that hand on codes.
        weights: layer -> elements of its outputs, by which a mixed network has its share of each rest.
        mixed: ms more that mixed networks take, if all of the network were so: see `gs_algos.analysis.between_layers`.
        batch: samples of a forward.
        missing: layer -> choice -> why the layer does not have it.
        checks: whole networks with random policies.
        machine: what the times depend on: device, instructions, threads, versions.
    """

    total: float
    layers: Mapping[str, Mapping[str, float]]
    rest: Mapping[str, float]
    weights: Mapping[str, int]
    batch: int
    mixed: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    checks: tuple[PolicyTime, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, policy: Mapping[str, str]) -> float:
        """Predicts the ms of the network: the sum of its layers, and what lies between them.

        A choice may have any width: codes of 3 bits run as those of 4, which they are stored in, those of 5 to 7 as
        those of 8, and activations as those of 8 bits. How a range is found makes no difference either.

        The latter is that of the float network, and for each choice the difference that it makes in all layers, by the
        elements of the outputs of those that have it. A layer on a grid for its inputs makes one only if the layer that
        runs after it has one too, which then reads codes. What mixed networks take besides was fitted to some.

        Args:
            policy: layer -> choice; a layer that is not in it stays float.

        Raises:
            ValueError: if a layer or its choice is not in the table.
        """
        policy = {name: self._timed(name, choice) for name, choice in policy.items()}
        ms = self._in_layers(policy) + self.rest[FLOAT]
        known = {**{choice: ms - self.rest[FLOAT] for choice, ms in self.rest.items()}, **self.mixed}
        return ms + sum(known.get(key, 0.0) * share for key, share in self._shares(policy).items())

    def _in_layers(self, policy: Mapping[str, str]) -> float:
        return sum(times[policy.get(name, FLOAT)] for name, times in self.layers.items())

    def _shares(self, policy: Mapping[str, str]) -> dict[str, float]:
        return shares(policy, {name: self.weights[name] for name in self.layers}, self.having)

    def _timed(self, name: str, choice: str) -> str:
        """Returns the choice of the table that takes a layer as long as `choice`."""
        known = self.layers.get(name, {})
        if choice in known:
            return choice
        alike = [one for one in known if one != FLOAT and as_run(one) == as_run(choice)]
        if not alike:
            must = f"one of {', '.join(known)}" if known else "a layer of the table"
            raise ValueError(f"{WHO}: {name} must be given {must}, got {choice!r}")
        return alike[0]

    def having(self, choice: str) -> list[str]:
        """Lists the layers that have a choice."""
        return [name for name, times in self.layers.items() if choice in times]

    @property
    def error(self) -> float | None:
        """Returns the median relative error of predictions of whole networks; None if none was timed."""
        errors = [abs(one.predicted / one.measured - 1) for one in self.checks]
        return statistics.median(errors) if errors else None

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Returns a table: a row for each layer, a column for each choice, in ms."""
        shown = list(self.rest)
        rows = [
            (name, *(f"{times[choice]:.3f}" if choice in times else "" for choice in shown))
            for name, times in self.layers.items()
        ]
        rows.append(("(between layers)", *(f"{self.rest[choice]:.3f}" for choice in shown)))
        whole = [self.predict(dict.fromkeys(self.having(choice), choice)) for choice in shown]
        rows.append(("(network)", *(f"{ms:.3f}" for ms in whole)))
        about = ", ".join(str(self.machine[key]) for key in ("device_name", "instructions") if self.machine.get(key))
        threads = self.machine.get("threads")
        below = [f"ms of a forward of {self.batch}, median; {about}, {threads} threads, torch {torch.__version__}"]
        without: dict[str, list[str]] = defaultdict(list)
        for name, whys in self.missing.items():
            for choice, why in whys.items():
                without[f"{choice}: {why}"].append(name)
        for what, names in without.items():
            more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
            below.append(f"without {what}: {', '.join(names[:FEW])}{more}")
        if self.error is not None:
            below.append(
                f"{len(self.checks)} networks with random choices: median error of the predicted ms "
                f"{100 * self.error:.1f} %"
                + ("" if self.error <= BAR else f", more than {100 * BAR:.0f} %: choose nothing by these times")
            )
        return Table.of(("layer", *shown), rows, below=below)


def latency_table(
    net: nn.Module,
    inputs: Inputs,
    choices: Sequence[str] = CHOICES,
    *,
    batch: int | None = None,
    seconds: float = 0.2,
    policies: int | Sequence[Mapping[str, str]] = POLICIES,
    seed: int = 0,
    path: Path | None = None,
) -> LatencyTable:
    """Times every linear and convolution of a float network in each form, alone, and whole networks. Changes nothing.

    Args:
        inputs: of one call.
        choices: `int4@channel`, weights alone; `int8@channel/int8@tensor`, inputs on a grid of their own too, or
            `int8@channel/int8@token`. A layer that cannot have one is left out of it, with the reason.
        batch: samples of the forward; default: those of `inputs`.
        seconds: for how long each layer and each network is timed, in each form.
        policies: whole networks that are timed, to say how well they are predicted: layer -> choice of each, or how
            many with random choices.
        seed: of these choices.
        path: a JSON file. Times that it holds from a machine, versions and threads like these are not measured again;
            new ones are added, one after the other, so that an interrupted run goes on.

    Raises:
        ValueError: if a choice is no scheme, the inputs do not run, the network has no float layer, or the file is none
            of this kind.
    """
    network = network_of(net, WHO)
    for choice in choices:
        parse(choice)
    given_policies = None if isinstance(policies, int) else [dict(policy) for policy in policies]
    count = policies if isinstance(policies, int) else len(policies)
    if count < 0 or not 0 <= seconds < float("inf"):
        raise ValueError(f"{WHO}: policies and seconds must be 0 or more, got {count} and {seconds}")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"{WHO}: batch must be a whole number from 1 on, got {batch!r}")
    store = TimeStore(path)
    with ordinary_tensors(), without_autocast(), evaluating(network):
        given = on_device(inputs, device_of(network))
        given = given if batch is None else resized(given, batch)
        sites = calls_of(network, given)
        facts = machine(device_of(network) or "cpu")
        timer = LayerTimer(store, facts, dict.fromkeys((FLOAT, *choices)), seconds)
        for name in progress(list(sites), "timing layers"):
            timer.add(name, get_module(network, name), sites[name])
        weights = {name: sum(call.outputs for call in calls) for name, calls in sites.items()}
        missing = {name: whys for name, whys in timer.missing.items() if whys}
        table = LatencyTable(0.0, timer.layers, {}, weights, samples_of(given), {}, missing, (), facts)
        drawn = _random_policies(timer.layers, count, seed) if given_policies is None else given_policies
        return _with_networks(table, network, given, seconds, drawn, seed)


def _random_policies(layers: Mapping[str, Mapping[str, float]], count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    return [{name: generator.choice(list(times)) for name, times in layers.items()} for _ in range(count)]


def _with_networks(
    table: LatencyTable,
    net: nn.Module,
    inputs: Inputs,
    seconds: float,
    policies: Sequence[Mapping[str, str]],
    seed: int,
) -> LatencyTable:
    """Times whole networks: with each choice in all layers, with random ones to fit to, and with policies to check."""
    choices = [*dict.fromkeys(choice for times in table.layers.values() for choice in times if choice != FLOAT)]
    uniform = [dict.fromkeys(table.having(choice), choice) for choice in choices]
    fitted = _random_policies(table.layers, FITTED * len(choices) if len(choices) > 1 or policies else 0, ~seed)
    floats: list[float] = []
    ratios: list[float] = []
    for policy in progress([*uniform, *fitted, *policies], "timing networks"):
        whole = in_forms(net, policy, inputs)
        before, after = _ms_of([net, whole], inputs, seconds)
        floats.append(before)
        ratios.append(after / before)
    total = statistics.median(floats) if floats else _ms_of([net], inputs, seconds)[0]
    measured = [ratio * total for ratio in ratios]
    base = total - table._in_layers({})
    known = {
        choice: ms - table._in_layers(policy) - base
        for choice, policy, ms in zip(choices, uniform, measured, strict=False)
    }
    rows = [*zip([*uniform, *fitted], measured, strict=False)]
    between = fit(
        [table._shares(policy) for policy, _ in rows],
        known,
        [ms - table._in_layers(policy) - base for policy, ms in rows],
        [ms for _, ms in rows],
    )
    rest = {FLOAT: base, **{choice: base + between.pop(choice) for choice in choices}}
    done = replace(table, total=total, rest=rest, mixed=between)
    checks = zip(policies, measured[len(rows) :], strict=True)
    return replace(done, checks=tuple(PolicyTime(policy, done.predict(policy), ms) for policy, ms in checks))


def _ms_of(nets: Sequence[nn.Module], inputs: Inputs, seconds: float) -> list[float]:
    args, kwargs = split_inputs(inputs)
    calls = [partial(net, *args, **kwargs) for net in nets]
    return [timing.p50 for timing in time_in_turns(calls, device_of(nets[0]) or "cpu", seconds)]
