"""Counts one training step of small networks, float and compressed: what it launches and keeps, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos import SLB, SimQAT
from gs_algos.qat.slb.optim import SlbSGD
from gs_kernels.aot.trace import traced

TARGET = "sm_90"
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "float": lambda: None,
    "SimQAT int8, ema": lambda: SimQAT(weight="int8@channel", act="int8@tensor:ema"),
    "SimQAT int4, lsq": lambda: SimQAT(weight="int4@channel:lsq", act="int8@tensor:lsq"),
    "SLB 2 bits": lambda: SLB(weight="2bit@channel", total_steps=1000),
    "SLB 2 bits, fused": lambda: SLB(weight="2bit@channel", total_steps=1000, fused=True),
}


def _conv() -> tuple[nn.Module, tuple[int, ...]]:
    def block(c: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(c, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    net = nn.Sequential(*block(64, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64))
    return net, (8, 64, 14, 14)


def _mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)), (64, 512)


NETWORKS = {"two 3x3 convolutions, a linear": _conv, "MLP 512-2048-512": _mlp}


@contextmanager
def kept_for_backward(ours: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, once, by its address; those of `ours` (parameters) do not count."""
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in ours:
            alive.append(storage)  # or another would get its address
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


@contextmanager
def references() -> Iterator[None]:
    """Ops compute what their references do: only what they would launch on a GPU is of interest."""
    before = os.environ.get("GS_BACKEND")
    os.environ["GS_BACKEND"] = "ref"
    try:
        yield
    finally:
        del os.environ["GS_BACKEND"]
        if before is not None:
            os.environ["GS_BACKEND"] = before


def step_rows() -> Iterator[dict[str, Any]]:
    """Yields one row per network and algorithm: its second training step, with SGD."""
    for network, make in NETWORKS.items():
        for algorithm, make_algorithm in ALGORITHMS.items():
            net, size = make()
            algo = make_algorithm()
            if algo is not None:
                net = algo.apply(net, torch.randn(2, *size[1:], generator=torch.Generator().manual_seed(0)))
            with references():
                yield {"network": network, "algorithm": algorithm, **_measure(net.train(), algo, size)}


def _measure(net: nn.Module, algo: Any, size: tuple[int, ...]) -> dict[str, Any]:
    weights = algo.parameters(net) if isinstance(algo, SLB) else net.parameters()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(weights, lr=0.1, foreach=True)]
    if isinstance(algo, SLB):
        optimizers.append(_of_logits(algo))
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    saved: list[int] = []

    def step() -> None:
        ours = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
        with kept_for_backward(ours) as kept:
            loss = net(x).square().mean()
        saved.append(sum(kept.values()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if algo is not None:
            algo.step()

    step()
    trace = traced(step, TARGET)
    return {"launches": len(trace.launches), "calls": len(trace.calls), "saved_bytes": saved[-1]}


def _of_logits(algo: SLB) -> torch.optim.Optimizer:
    if algo.config.fused:
        return SlbSGD(algo.fused_layers(), lr=0.1)
    return torch.optim.SGD(algo.logits(), lr=0.1, foreach=True)
