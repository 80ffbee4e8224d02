"""Two processes that see half of the data each round a network as one that sees all of it does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from gs_algos import PTQ
from tests.ptq.test_routed import Mixture

WORLD = 2


class Experts(nn.Module):
    """Tokens of one sign go to one expert, so that a process may see no token of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + (self.left(x) if float(x.mean()) < 0 else self.right(x))


def _net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()
    return nn.Sequential(*first, Experts(), Mixture(8, large=0.95), nn.Linear(8, 4)).eval()


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(64, 8, generator=generator) for _ in range(4)]
    return [*data, data[0], data[1]]  # the last of each process is held out


def _calibrate(batches: list[torch.Tensor], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    algo = PTQ(weight="int4@group:8", blocks="none", **options)
    net = algo.apply(_net(), batches[0])
    algo.calibrate(net, batches)
    assert algo.report is not None and len(algo.report.layers) == 17
    return {key: value.contiguous() for key, value in algo.convert(net).state_dict().items()}


def _worker(rank: int, rendezvous: str, results: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    save_file(_calibrate(_batches()[rank::WORLD], options), f"{results}/{rank}.safetensors")
    dist.barrier()
    os._exit(0)  # without the process group's destructor, which can wait for ever for a peer that has gone


def _same_in_both(tmp_path: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what two processes end with, each with half of the data."""
    mp.spawn(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path), options), nprocs=WORLD, join=True)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0, msg=key)
    return first


@pytest.mark.parametrize("transforms", [(), ("smooth", "awq")])
def test_two_processes_end_with_the_network_of_one(tmp_path, transforms):
    first = _same_in_both(tmp_path, {"transforms": transforms})
    data = _batches()
    order = [*data[0:4], data[4]]  # one process holds the last of five out: the same four enter the statistics
    alone = _calibrate(order, {"transforms": transforms})
    same = [float((alone[key] == value).float().mean()) for key, value in first.items() if key.endswith("codes")]
    assert min(same) > 0.95, same


def test_two_processes_tune_one_network_on_the_data_of_both(tmp_path):
    tuned = _same_in_both(tmp_path, {"rounding": "signround", "steps": 20})
    plain = _calibrate(_batches(), {})
    assert any(not torch.equal(tuned[key], plain[key]) for key in tuned if key.endswith("codes"))
