"""Two processes that see different data choose the same codes, under DDP and FSDP2, past the step that chooses them."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gs_algos import SLB
from gs_algos.qat.slb.optim import SlbAdamW

WORLD, STEPS = 2, 5  # the codes are chosen after step 3
CASES = [(wrapper, fused) for wrapper in ("ddp", "fsdp2") for fused in (False, True)]


def build() -> tuple[nn.Module, SLB]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 4))  # 15 rows do not fall evenly on two ranks
    rules = [("2", {"weight": "1bit@tensor:learned"})]
    algo = SLB(weight="2bit@channel", act="uint8@tensor:ema", total_steps=STEPS, rules=rules, trace=3)
    return algo.apply(net, torch.randn(4, 8)), algo


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + rank)


def optimizers(net: nn.Module, algo: SLB) -> list[torch.optim.Optimizer]:
    rest = torch.optim.SGD(algo.parameters(net), lr=0.1, momentum=0.9, weight_decay=0.1)
    fused = algo.fused_layers()
    if fused:
        return [rest, SlbAdamW(fused, lr=0.05)]
    return [rest, torch.optim.AdamW([*algo.logits()], lr=0.05, weight_decay=0.1)]


def _train(rank: int, wrapper: str, fused: bool) -> dict[str, torch.Tensor]:
    net, algo = build_fused() if fused else build()
    wrapped: nn.Module = DistributedDataParallel(net) if wrapper == "ddp" else fully_shard(net)
    each = optimizers(net, algo)
    for step in range(STEPS):
        wrapped(batch(step, rank)).square().mean().backward()
        for optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
        algo.step()
    state = {k: v.detach().clone() for k, v in net.state_dict().items()}
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def _worker(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.save({case: _train(rank, *case) for case in CASES}, f"{results}/{rank}.pt")
    dist.barrier()
    # leaves without the process group's destructor, which can wait for ever for a peer that has gone
    os._exit(0)


def build_fused() -> tuple[nn.Module, SLB]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 4))
    algo = SLB(weight="2bit@channel", total_steps=STEPS, fused=True, trace=3)
    return algo.apply(net, torch.randn(4, 8)), algo


def alone(fused: bool) -> dict[str, torch.Tensor]:
    """The same training in one process: the mean of both ranks' losses."""
    net, algo = build_fused() if fused else build()
    each = optimizers(net, algo)
    for step in range(STEPS):
        loss = sum(net(batch(step, rank)).square().mean() for rank in range(WORLD)) / WORLD
        loss.backward()
        for optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
        algo.step()
    return net.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], dict[str, torch.Tensor]]]:
    """What each rank ends with, by case; starting two processes takes longer than all the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder / "rendezvous"), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("wrapper, fused", CASES)
def test_ranks_choose_the_codes_that_one_process_would(wrapper, fused, ranks):
    first, second = (results[wrapper, fused] for results in ranks)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    want = alone(fused)
    for key in ("0.search.codes", "2.search.codes"):
        assert torch.equal(first[key], want[key]) and first[key].any()
    assert first["0.search.temperature"].item() == 0
    for key in ("0.bias", "2.bias", "0.search.trace", *(["0.weight", "2.weight"] if fused else ["2.search.scale"])):
        torch.testing.assert_close(first[key], want[key], rtol=1e-4, atol=1e-5)
