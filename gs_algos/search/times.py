"""Gets the latency table that a budget of milliseconds needs, and refuses one that does not tell the truth here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gs_algos.analysis.latency_table import BAR, LatencyTable, PolicyTime, latency_table
from gs_algos.core.algorithm import Inputs
from gs_algos.core.arguments import as_path
from gs_algos.core.batches import device_of, samples_of
from gs_algos.core.machine import machine
from gs_algos.ptq.processes import Processes

SECONDS = 0.5  # of timing, for each layer and network in each form
SAME = ("device", "device_name", "instructions", "threads", "torch", "triton")  # or times are others


def table_for(
    network: nn.Module,
    inputs: Inputs,
    forms: Sequence[str],
    policies: Sequence[Mapping[str, str]],
    given: LatencyTable | str | os.PathLike[str] | None,
    processes: Processes,
    who: str,
) -> LatencyTable:
    """Returns the table that was given, or one that is measured now, by the first process; times of a file are kept.

    Args:
        forms: that layers can have.
        policies: layer -> form of whole networks, which tell how well the table predicts.

    Raises:
        ValueError: if it is of another machine, other versions or another batch, or predicts five whole networks with
            random choices worse than within 10 %.
    """
    facts = machine(device_of(network) or "cpu")
    if isinstance(given, LatencyTable):
        _refuse_other(given.machine, facts, "the latency table", who)
        if given.batch != samples_of(inputs):
            raise ValueError(
                f"{who}: the latency table must be of forwards of {samples_of(inputs)}, as the example inputs, got "
                f"{given.batch}"
            )
        table = given
    else:
        path = None if given is None else as_path(given, f"{who}: latency")
        if path is not None and path.exists():
            _refuse_foreign(path, facts, who)
        table = _of_first(
            lambda: latency_table(network, inputs, forms, seconds=SECONDS, policies=policies, path=path), processes, who
        )
    if table.error is not None and table.error > BAR:
        checks = "; ".join(f"{one.predicted:.3g} ms for {one.measured:.3g}" for one in table.checks)
        got = f"{100 * table.error:.0f} % in the median of {len(table.checks)} ({checks})"
        raise ValueError(
            f"{who}: the latency table must predict whole networks within {100 * BAR:.0f} %, got {got}; measure it "
            "while nothing else runs, by golden-stick latency with more --seconds, or give a budget of bytes"
        )
    return table


def _of_first(measure: Callable[[], LatencyTable], processes: Processes, who: str) -> LatencyTable:
    """Returns the table that the first process measures, in all of them."""
    if not processes.several:
        return measure()
    data = b""
    if processes.rank == 0:
        try:
            data = json.dumps({"table": asdict(measure())}).encode()
        except Exception as error:  # noqa: BLE001  the other processes wait, whatever it is
            data = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    found = json.loads(processes.from_one(data))
    if "error" in found:
        raise RuntimeError(f"{who}: a process failed: {found['error']}")
    checks = tuple(PolicyTime(**one) for one in found["table"]["checks"])
    return LatencyTable(**{**found["table"], "checks": checks})


def _refuse_other(theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str, who: str) -> None:
    """Raises ValueError if times are of another machine, or of other versions."""
    differs = [f"{key} {theirs.get(key)}, here {ours.get(key)}" for key in SAME if theirs.get(key) != ours.get(key)]
    if differs:
        raise ValueError(
            f"{who}: {what} must be of this machine and these versions, got one of {'; '.join(differs)}; "
            "measure it here by golden-stick latency"
        )


def _refuse_foreign(path: Path, facts: Mapping[str, Any], who: str) -> None:
    """Raises ValueError if a file holds times, and none of this machine. What else is wrong is told by who reads it."""
    try:
        rows = json.loads(path.read_text())["rows"]
        mine = [row for row in rows if all(row.get(key) == facts.get(key) for key in SAME)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if rows and not mine:
        _refuse_other(rows[0], facts, str(path), who)
