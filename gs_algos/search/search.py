"""Searches settings layer by layer: which scheme each weight gets, which share of its channels each layer loses."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from typing_extensions import Unpack

from gs_algos.analysis.latency_table import POLICIES, LatencyTable
from gs_algos.core.algorithm import Algorithm, Inputs
from gs_algos.core.batches import InputsOf, checked_batches, device_of, on_device, samples_of
from gs_algos.core.network import network_of, ordinary_tensors
from gs_algos.ghost.ghost import Ghost
from gs_algos.ptq.journal import digest_of
from gs_algos.ptq.processes import Processes
from gs_algos.search.agent import Evaluated, agent_class
from gs_algos.search.budget import Budget
from gs_algos.search.config import SearchConfig, SearchOptions
from gs_algos.search.cost import Costs
from gs_algos.search.driver import OnStep, drive
from gs_algos.search.evaluate import Evaluate, Evaluations, ProbeScore, Score, measured_scores
from gs_algos.search.front import curve_of, front_of
from gs_algos.search.ilp import first_picks
from gs_algos.search.journal import Journal
from gs_algos.search.policy import WHO, Policy, with_rules
from gs_algos.search.problem import Limit, Problem, Scores, limits_of, reduced, refuse_untimed, shown
from gs_algos.search.space import Picks, Setting, Space, layer_calls, make_space
from gs_algos.search.target import FLOAT, Target
from gs_algos.search.times import table_for
from gs_algos.search.tuned import Tune, TunedScore


def search_rules(
    model: nn.Module,
    inputs: Inputs,
    algorithms: Algorithm | Sequence[Algorithm],
    data: Iterable[Any],
    config: SearchConfig | None = None,
    *,
    evaluate: Evaluate | None = None,
    tune: Tune | None = None,
    latency: LatencyTable | str | os.PathLike[str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    on_step: OnStep | None = None,
    **options: Unpack[SearchOptions],
) -> Policy:
    """Chooses a value for each layer that has a choice, so that the network fits a budget and changes least.

    The layers and choices are those of the algorithms' plans; rules of yours stay, and the first and the last layer get
    8 bits unless a rule says otherwise. The network is left as it was.

    In several processes of `torch.distributed`, each takes a share of what is to be measured, and all return the same.

    Args:
        inputs: of one call. Multiply-adds and times are those of a forward of so many samples.
        algorithms: one, or those of a pipeline in order, such as `[Prune(), SimQAT()]`.
        data: batches of training inputs, `(x, y)` or `x`; some hundred images are enough. Never the test set.
        evaluate: a function of the network, on which a policy is set, that returns its score: higher is better.
            Default: minus the KL divergence from the float network's class probabilities, on the data.
        tune: trains a copy that an algorithm has prepared, before `evaluate` sees it: `tune(network, algorithm)`.
        latency: the table of a latency budget, or its file, as `golden-stick latency` writes it; else it is measured.
        journal: a file that keeps what was measured, so that a killed search, or one with another budget, goes on.
        on_step: called with policies so far, at most, and the best score.
        options: those of `SearchConfig`, by keyword.

    Raises:
        ValueError: if nothing has a choice, no network meets the budget, a score is NaN, there are fewer data than a
            batch, or a latency table is of another machine or does not predict networks within 10 %.
    """
    chosen = SearchConfig.choose(config, dict(options))
    given = [algorithms] if isinstance(algorithms, Algorithm) else list(algorithms)
    _refuse_unsearchable(given)
    if tune is not None and evaluate is None:
        raise ValueError(f"{WHO}: tune needs evaluate, a function that scores the trained network, got none")
    with ordinary_tensors():
        network = network_of(model, WHO)
        inputs = on_device(inputs, device_of(network))
        batches = _batches(network, inputs, data)
        processes = Processes(process_group)
        budgets = Budget.parse_all(chosen.budget, WHO)
        targets = [Target.of(number, one, network, inputs, WHO) for number, one in enumerate(given)]
        calls = layer_calls(network, inputs, WHO)
        space = make_space(targets, network, calls, chosen.choices, chosen.acts, WHO)
        for end in _ends(space):  # a value that an algorithm cannot have is refused before anything is measured
            _algorithms(given, space, end)
        refuse_untimed(budgets, space, WHO)
        table = None
        if any(budget.kind == "latency" for budget in budgets):
            forms, mixed = _forms(Costs(targets, network, inputs, calls, None, WHO), space, chosen.seed)
            table = table_for(network, inputs, forms, mixed, latency, processes, WHO)
        costs = Costs(targets, network, inputs, calls, table, WHO)
        limits = limits_of(budgets, space, costs, WHO)
        score = ProbeScore(targets, network, batches, evaluate, WHO)
        kept = Journal(journal, _digest(network, given, batches, evaluate, tune, chosen), WHO)
        measure: Score = score
        if tune is not None and evaluate is not None:
            measure = TunedScore(network, inputs, lambda s: _algorithms_of(given, space, s), tune, evaluate)
        evaluations = Evaluations(measure, kept, processes, WHO)

        def solve(limits: Sequence[Limit], agent: str) -> Policy:
            small, notes = reduced(space, costs, limits)

            def scores() -> Scores:
                return measured_scores(small.knobs, chosen.score, chosen.seed, score, network, kept, processes, WHO)

            baseline = 0.0 if evaluate is None else evaluations([{}])[0]
            problem = Problem(
                small, tuple(limits), costs, scores, chosen.evaluations, chosen.seed, network, calls, baseline
            )
            _refuse_unmet(problem)
            started, before = time.perf_counter(), evaluations.count
            if agent:
                found = drive(agent_class(agent, WHO)(problem), problem, evaluations, on_step)
            else:
                picks = first_picks(problem)[0]
                found = {picks: Evaluated(picks, picks, evaluations([small.setting(picks)])[0])}
            best = min(found.values(), key=lambda one: (-one.score, problem.total(one.picks, limits[0].kind)))
            measured = evaluations.count - before, time.perf_counter() - started
            policy = _policy(problem, best, list(found.values()), given, measured, notes)
            return replace(policy, by_divergence=evaluate is None)

        def again(budget: str) -> Policy:
            return replace(solve(limits_of(Budget.parse_all(budget, WHO), space, costs, WHO), ""), _again=again)

        return replace(solve(limits, chosen.agent), _again=again)


def _policy(
    problem: Problem,
    best: Evaluated,
    found: Sequence[Evaluated],
    algorithms: Sequence[Algorithm],
    measured: tuple[int, float],
    notes: Sequence[str],
) -> Policy:
    space, kinds = problem.space, [limit.kind for limit in problem.limits]
    return Policy(
        rules=tuple(space.rules(best.picks, number) for number in range(len(algorithms))),
        setting={kind: own for kind, own in space.setting(best.picks).items() if own},
        costs={kind: problem.total(best.picks, kind) for kind in kinds},
        limits={limit.kind: limit.most for limit in problem.limits},
        before={kind: problem.costs.before(kind) for kind in kinds},
        score=best.score,
        baseline=problem.baseline,
        predicted=problem.predicted(best.picks) if problem.scored else None,
        front=front_of(problem, found),
        curve=curve_of(problem) if problem.scored else (),
        evaluated=measured[0],
        seconds=measured[1],
        notes=(*space.notes, *notes),
        _given=tuple(algorithms),
    )


def _refuse_unsearchable(algorithms: Sequence[Any]) -> None:
    if not algorithms:
        raise ValueError(f"{WHO}: at least one algorithm must be given, got none")
    for algorithm in algorithms:
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"{WHO}: algorithms must be such as SimQAT(), got {algorithm!r:.60}")
        if not hasattr(algorithm.config, "rules"):
            raise ValueError(f"{WHO}: an algorithm must have rules to search for, got {algorithm.name} without")
    if len(algorithms) > 1 and any(isinstance(algorithm, Ghost) for algorithm in algorithms):
        names = ", ".join(algorithm.name for algorithm in algorithms)
        raise ValueError(
            f"{WHO}: ghost must be searched alone, since it replaces the layers that others have rules for, got "
            f"{names}; search for the others on the network that it leaves"
        )


def _batches(network: nn.Module, inputs: Inputs, data: Iterable[Any]) -> list[Inputs]:
    """Returns the inputs of all batches.

    Raises:
        ValueError: if there are fewer samples than a batch has.
    """
    inputs_of, device = InputsOf(WHO, network, inputs), device_of(network)
    batches = [on_device(inputs_of(batch), device) for batch in checked_batches(WHO, data)]
    samples = sum(map(samples_of, batches))
    if samples < samples_of(inputs):
        drops = "; a loader with drop_last=True leaves out a batch that is not full" if not batches else ""
        raise ValueError(
            f"{WHO}: data must hold at least as many samples as the example inputs, {samples_of(inputs)}, got "
            f"{samples}{drops}"
        )
    return batches


def _ends(space: Space) -> list[Picks]:
    longest = max(len(knob.values) for knob in space.knobs)
    return [tuple(min(i, len(knob.values) - 1) for knob in space.knobs) for i in range(longest)]


def _forms(costs: Costs, space: Space, seed: int) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the forms that layers can have, and some random networks of the space, for the latency table."""
    found: dict[str, None] = {}
    for picks in _ends(space):
        for others in _ends(space):
            mixed = tuple(a if k.kind == "weight" else b for k, a, b in zip(space.knobs, picks, others, strict=True))
            found |= dict.fromkeys(costs.forms(space.setting(mixed)).values())
    generator = random.Random(seed)
    drawn = [tuple(generator.randrange(len(k.values)) for k in space.knobs) for _ in range(POLICIES)]
    return [form for form in found if form != FLOAT], [costs.forms(space.setting(picks)) for picks in drawn]


def _algorithms(algorithms: Sequence[Algorithm], space: Space, picks: Picks) -> list[Algorithm]:
    return [with_rules(algorithm, space.rules(picks, number)) for number, algorithm in enumerate(algorithms)]


def _algorithms_of(algorithms: Sequence[Algorithm], space: Space, setting: Setting) -> list[Algorithm]:
    return _algorithms(algorithms, space, tuple(k.values.index(setting[k.kind][k.site]) for k in space.knobs))


def _digest(
    network: nn.Module,
    algorithms: Sequence[Algorithm],
    batches: Sequence[Inputs],
    evaluate: Evaluate | None,
    tune: Tune | None,
    config: SearchConfig,
) -> str:
    """Returns a digest of what scores depend on: not of the budget, the agent or the choices."""
    functions = [None if f is None else f"{f.__module__}.{f.__qualname__}" for f in (evaluate, tune)]
    options = {
        "algorithms": [[a.name, a.config.to_dict()] for a in algorithms],
        "functions": functions,
        "score": [config.score, config.seed],
    }
    return digest_of(network, options, batches)


def _refuse_unmet(problem: Problem) -> None:
    """Raises ValueError if no picks fit, and says what the best is that can be."""
    if problem.least_that_fits is not None:
        return
    told = []
    for limit in problem.limits:
        least = min(problem.total(p, limit.kind) for p in (problem.least, problem.cheapest(limit.kind)))
        share = 100 * least / problem.costs.before(limit.kind)
        told.append(f"at least {shown(least, limit.kind)} ({share:.1f} % of the float network)")
    both = ", which do not go together" if all(problem.fits_alone(limit) for limit in problem.limits) else ""
    got = ", ".join(limit.text for limit in problem.limits)
    raise ValueError(f"{WHO}: the budget must allow {' and '.join(told)}{both}, got {got!r}")
