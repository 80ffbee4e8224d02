"""Two processes that see different data end with the same grid and the same weights, under DDP and FSDP2."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gs_algos import SimQAT

WORLD = 2
CASES = [
    (wrapper, act)
    for act in ("int8@tensor:minmax", "int8@tensor:ema=0.5", "int8@tensor:lsq")
    for wrapper in ("ddp", "fsdp2")
]


def _train(rank: int, wrapper: str, act: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    algo = SimQAT(weight="int4@channel:lsq" if "lsq" in act else "int4@channel", act=act)
    net = algo.apply(net, torch.randn(4, 8))
    wrapped: nn.Module
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(net)
    else:
        wrapped = fully_shard(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    seen = []
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 3 * rank)
        seen.append(torch.stack([-x.min(), x.max()]))
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    if wrapper == "fsdp2":
        net.unshard()
    state = {k: v.detach().clone() for k, v in net.state_dict().items()}
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    return {"state": state, "seen": torch.stack(seen)}


def _worker(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.save({case: _train(rank, *case) for case in CASES}, f"{results}/{rank}.pt")
    dist.barrier()
    # leaves without the process group's destructor, which can wait for ever for a peer that has gone
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each rank ends with, by case; starting two processes takes longer than all the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder / "rendezvous"), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("wrapper, act", CASES)
def test_ranks_agree_on_ranges_and_weights(wrapper, act, ranks):
    first, second = (results[wrapper, act] for results in ranks)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    if "minmax" in act:
        extremes = torch.cat([first["seen"], second["seen"]]).amax(0)  # the wide batches were on rank 1 only
        assert torch.equal(first["state"]["0.input_quantizer.range"], extremes)
