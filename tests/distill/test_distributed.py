"""Two processes that see different data end with the same student, twin and projections, under DDP."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gs_algos import Distill, SimQAT
from tests.nets.convolutional import SmallConvNet, images

WORLD = 2


def _worker(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    net, teacher = SmallConvNet(), SmallConvNet()
    algo = Distill(SimQAT(act="int8@tensor:minmax"), teacher, features=1.0, kind="kernel", train_teacher=True)
    net = algo.apply(net, images())
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    loss_fn = algo.loss(F.cross_entropy)
    for step in range(3):
        loss_fn(wrapped(images(seed=10 * step + rank)), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    left = [name for name in algo.convert(wrapped).state_dict() if "distill" in name]
    torch.save({"trained": trained, "left": left}, f"{results}/{rank}.pt")
    dist.barrier()
    # leaves without the process group's destructor, which can wait for ever for a peer that has gone
    os._exit(0)


def test_ranks_agree_on_the_student_its_twin_and_the_projections(tmp_path):
    mp.spawn(_worker, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert {"distill_projection_0", "distill_widths_0", "distill_teacher_0"} <= first["trained"].keys()
    assert all(torch.equal(value, second["trained"][name]) for name, value in first["trained"].items())
    assert first["left"] == second["left"] == []
