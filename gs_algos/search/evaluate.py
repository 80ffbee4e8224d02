"""Measures how good policies are: by running a private copy on which they are set, each once, on one or many processes.

The score of a policy is `-KL(float || policy)` of the class probabilities on the data, by the probe that measures
sensitivity too; or what the user's function returns for the network on which the policy is set.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from gs_algos.analysis import probe
from gs_algos.analysis.divergence import Trials
from gs_algos.analysis.sensitivity import sensitivity
from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.batches import resized, samples_of
from gs_algos.core.network import ordinary_tensors, without_autocast
from gs_algos.pruning.pruner import Pruner
from gs_algos.pruning.reconstruct import readers_of, reconstruct
from gs_algos.ptq.processes import Processes
from gs_algos.quant.network.layer_plan import LayerPlan
from gs_algos.search.ghosts import GhostTrials
from gs_algos.search.journal import Journal, key_of
from gs_algos.search.kinds import Value
from gs_algos.search.problem import Scores
from gs_algos.search.space import Knob, Setting
from gs_algos.search.target import FLOAT, GHOST_RATIO, Target
from gs_kernels.runtime.torch_private import _NormBase

Score: TypeAlias = Callable[[Setting], float]
Evaluate: TypeAlias = Callable[[nn.Module], float]
REFITTED = 32  # samples that a pruned network is refitted to before it is scored


class ProbeScore:
    """Scores a setting on a private copy of the network: weights and inputs are rounded to nearest, channels masked.

    What reads masked channels is refitted first, on some samples, if the algorithm that prunes has `reconstruct`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        network: nn.Module,
        batches: Sequence[Inputs],
        evaluate: Evaluate | None,
        who: str,
    ) -> None:
        self.targets, self.batches, self.evaluate, self.who = targets, list(batches), evaluate, who
        rows = [row for target in targets for row in target.rows if isinstance(row.settings, LayerPlan)]
        self.acts = {row.site: row.settings.act for row in rows if row.settings.act is not None}
        self.probe = probe.Probe(network, who, self.acts)
        self.trials = Trials(self.probe, self.batches)
        self.probe.find_ranges(self.batches, list(self.acts))
        pruners = [target.algorithm for target in targets if isinstance(target.algorithm, Pruner)]
        refits = any(pruner.config.reconstruct for pruner in pruners)
        self.ghosts = GhostTrials(targets, self.probe.network, self.batches, who)
        self.whole = copy.deepcopy(self.probe.network) if refits else None

    def __call__(self, setting: Setting) -> float:
        with self._set(self.policy(setting), setting) as network:
            if self.evaluate is None:
                return -self.trials.compared(network).divergence
            return float(self.evaluate(network))

    def divergence(self, setting: Setting) -> float:
        """Returns KL(float || setting), whatever scores policies; what the setting does not name stays float."""
        with self._set(self.policy(setting, alone=True), setting) as network:
            return self.trials.compared(network).divergence

    @contextmanager
    def _set(self, policy: probe.Policy, setting: Setting) -> Iterator[nn.Module]:
        """Sets a policy on the copy. Without channels it is refitted if the algorithm would be, and has the statistics
        of batch norm that it then has.
        """
        network = self.probe.network
        ghosts = {site: int(value) for site, value in setting.get(GHOST_RATIO, {}).items() if value != FLOAT}
        with ordinary_tensors(), without_autocast(), self.probe.set(policy), self.ghosts.put_in(ghosts):
            if ghosts:
                with fresh_statistics(network, self.batches, self.who):
                    yield network
                return
            if policy.kept is None:
                yield network
                return
            with self._refitted(policy), fresh_statistics(network, self.batches, self.who):
                yield network

    @contextmanager
    def _refitted(self, policy: probe.Policy) -> Iterator[None]:
        """Refits what reads channels that go, as `Pruner.reconstruct` does."""
        if self.whole is None or policy.kept is None:
            yield
            return
        network = self.probe.network
        layers = [self.probe.layer(reader.name) for reader in readers_of(network, *policy.kept)]
        biases = [(x.bias, x.bias.clone()) for x in layers if x.bias is not None]  # the probe holds the weights
        first = self.batches[0]
        seen = [resized(first, min(REFITTED, samples_of(first)))]
        try:
            reconstruct(network, self.whole, *policy.kept, seen, self.who)
            self.probe.round(policy)
            yield
        finally:
            with torch.no_grad():
                for bias, values in biases:
                    bias.copy_(values)

    def policy(self, setting: Setting, alone: bool = False) -> probe.Policy:
        """Returns what the probe is to round. alone: inputs of layers only where the setting names them."""
        schemes = {site: str(value) for site, value in setting.get("weight", {}).items()}
        acts = {site: str(value) for site, value in setting.get("act", {}).items()}
        acts = acts if alone else {**self.acts, **acts}
        weights = {site: scheme for site, scheme in schemes.items() if scheme != FLOAT}
        if not alone:
            acts = {site: act for site, act in acts.items() if site in weights}
        rates: Any = setting.get("rate", {})
        pruned = next((target.pruned for target in self.targets if target.pruned is not None), None)
        kept = None if pruned is None or not rates else (pruned.groups, pruned.keep(rates))
        return probe.Policy(weights, acts, {}, kept)


@contextmanager
def fresh_statistics(network: nn.Module, batches: Sequence[Inputs], who: str) -> Iterator[None]:
    """Gives batch norms the means and variances of these batches for the duration of the block.

    A pruned network is told from a better one much more surely so (Li et al. 2020, arXiv:2007.02491).
    """
    norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        with torch.no_grad():
            for batch in batches if norms else ():
                run(network, batch, who)
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
        for buffer, values in before:
            buffer.copy_(values)


class Evaluations:
    """Scores settings: those in the journal are looked up, the others shared among the processes of a group.

    count: how many were measured here, by all processes.
    """

    def __init__(self, score: Score, journal: Journal, processes: Processes, who: str) -> None:
        self.score, self.journal, self.processes, self.who = score, journal, processes, who
        self.count = 0

    def __call__(self, settings: Sequence[Setting]) -> list[float]:
        """Returns the score of each, in order; the same in every process.

        Raises:
            ValueError: if a score is NaN.
        """
        policies = [flat(setting) for setting in settings]
        new = {key_of(policy): i for i, policy in enumerate(policies) if key_of(policy) not in self.journal.policies}
        share = list(new.values())[self.processes.rank :: self.processes.count]
        if self.processes.several:
            for found in shared(self.processes, [self._measured(settings[i], i) for i in share], self.who):
                self._keep(policies[found["index"]], found)
        else:
            for i in share:  # each is in the journal before the next one begins
                self._keep(policies[i], self._measured(settings[i], i))
        return [self.journal.policies[key_of(policy)] for policy in policies]

    def _keep(self, policy: Mapping[str, Value], found: Mapping[str, Any]) -> None:
        self.count += 1
        score = found["score"]
        if score != score:
            chosen = ", ".join(f"{name} {value}" for name, value in policy.items()) or "nothing changed"
            raise ValueError(f"{self.who}: evaluate must return a number, got NaN for the network with {chosen:.300}")
        self.journal.add_policy(policy, score, found["seconds"], write=self.processes.rank == 0)

    def _measured(self, setting: Setting, index: int) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            score = self.score(setting)
        except Exception as error:
            if not self.processes.several:
                raise
            return {"error": f"{type(error).__name__}: {error}"}
        return {"index": index, "score": score, "seconds": time.perf_counter() - started}


def measured_scores(
    knobs: Sequence[Knob],
    by: str,
    seed: int,
    score: ProbeScore,
    network: nn.Module,
    journal: Journal,
    processes: Processes,
    who: str,
) -> Scores:
    """Returns what each value of each knob costs alone; those in the journal are not measured again.

    Weights are measured by `sensitivity`; inputs and prune rates as KL(float || probe) of the network with that alone.
    """
    lacking = [k for k in knobs if not {str(v) for v in k.values} <= journal.scores.get(k.name, {}).keys()]
    mine = lacking[processes.rank :: processes.count]
    weights = {k.site: [str(v) for v in k.values if v != FLOAT] for k in mine if k.kind == "weight"}
    results: list[dict[str, Any]] = []
    try:
        found = {}
        if weights:
            own = sensitivity(network, score.batches, weights, by=by, seed=seed, who=who).scores
            found = {f"{site}:weight": {**scores, FLOAT: 0.0} for site, scores in own.items()}
        for knob in mine:
            if knob.kind != "weight":
                found[knob.name] = {str(v): score.divergence({knob.kind: {knob.site: v}}) for v in knob.values}
        results = [{"scores": found}]
    except Exception as error:
        if not processes.several:
            raise
        results = [{"error": f"{type(error).__name__}: {error}"}]
    for part in shared(processes, results, who):
        if part["scores"]:
            journal.add_scores(part["scores"], write=processes.rank == 0)
    return {k.name: {v: journal.scores[k.name][str(v)] for v in k.values} for k in knobs}


def flat(setting: Setting) -> dict[str, Value]:
    """Returns a setting as `layer:kind` -> value."""
    return {f"{site}:{kind}": value for kind, own in setting.items() for site, value in own.items()}


def shared(processes: Processes, results: Sequence[Mapping[str, Any]], who: str) -> list[dict[str, Any]]:
    """Returns the results of all processes.

    Raises:
        RuntimeError: in all of them, if one of them has an error.
    """
    parts = processes.from_all(json.dumps(list(results)).encode()) if processes.several else []
    found = [one for part in parts for one in json.loads(part)] if processes.several else [dict(r) for r in results]
    for one in found:
        if "error" in one:
            raise RuntimeError(f"{who}: a process failed: {one['error']}")
    return found
