"""Networks that are prepared in several threads at once come out as they do one after the other."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SLB, SimQAT
from gs_algos.fx.capture.capture import capture
from tests.helpers import relative_rms
from tests.nets.convolutional import SmallConvNet, images, train


class Branching(nn.Module):
    """Which path it takes depends on data: torch.export gives up on it, and other tracers are tried."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.eye(4)), nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.flatten(1))
        return F.linear(y, self.weight) if float(y.detach().sum()) < 1e9 else y


def converted(net: nn.Module, algo) -> Tensor:
    train(net, algo)
    net = algo.convert(net.eval())
    with torch.no_grad():
        return net(images())


@pytest.mark.parametrize("make", [SimQAT, lambda: SLB(total_steps=3)])
def test_networks_prepared_in_two_threads_at_once_are_those_prepared_in_turn(make):
    torch.manual_seed(0)
    nets = [SmallConvNet(), Branching()]
    twins, algos = copy.deepcopy(nets), [make() for _ in range(4)]
    prepared = [algo.apply(net, images()) for net, algo in zip(twins, algos[:2], strict=True)]
    want = [converted(net, algo) for net, algo in zip(prepared, algos[:2], strict=True)]
    together = threading.Barrier(len(nets))

    def prepare(i: int) -> None:
        together.wait()
        nets[i] = algos[2 + i].apply(nets[i], images())

    threads = [threading.Thread(target=prepare, args=(i,)) for i in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [converted(net, algo) for net, algo in zip(nets, algos[2:], strict=True)]
    assert all(relative_rms(y, w) < 1e-5 for y, w in zip(got, want, strict=True))


def test_a_model_that_runs_in_another_thread_is_not_traced():
    other, answers, x = nn.Linear(6, 6), [], torch.randn(2, 6)

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: answers.append(other(torch.ones(6))))
            thread.start()
            thread.join()
            float(x.sum()) if isinstance(x, Tensor) else x  # torch.export gives up here
            return self.fc(x)

    graph = capture(Interrupted(), x)
    assert graph.tracer == "symbolic_trace" and [node.module for node in graph.nodes if node.module] == ["fc"]
    assert answers and all(torch.equal(y, other(torch.ones(6))) for y in answers)
