"""Two processes, each of which measures a share of the policies, find what one finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gs_algos.search.evaluate import Evaluations
from tests.search.nets import found

WORLD = 2
AGENTS = ("ilp", "evolution")
OPTIONS = {"budget": "16% bytes", "evaluations": 40}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    own: list[int] = []
    measured = Evaluations._measured
    Evaluations._measured = lambda self, setting, index: own.append(index) or measured(self, setting, index)
    told: dict[str, Any] = {}
    for agent in AGENTS:
        before = len(own)
        policy = found(agent=agent, journal=f"{folder}/{agent}", **OPTIONS)
        told[agent] = [repr(policy.rules), policy.score, policy.evaluated, len(own) - before]
    try:
        found(agent="random", evaluate=lambda network: float("nan"), **OPTIONS)
    except ValueError as error:
        told["error"] = str(error)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # without the process group's destructor, which can wait for ever for a peer that has gone


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("both")
    mp.spawn(_worker, args=(str(folder),), nprocs=WORLD, join=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("agent", AGENTS)
def test_two_processes_find_the_policy_of_one_and_share_its_evaluations(both, agent):
    alone = found(agent=agent, **OPTIONS)
    first, second = (one[agent] for one in both)
    assert first[:3] == second[:3] == [repr(alone.rules), alone.score, alone.evaluated]
    assert first[3] + second[3] == alone.evaluated and min(first[3], second[3]) > 0


def test_a_score_that_is_nan_ends_both(both):
    assert all("evaluate must return a number, got NaN" in one["error"] for one in both)
