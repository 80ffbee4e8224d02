"""A default dtype or device that the program has set changes nothing in `apply`, training, `convert` and `load`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import PTQ, SLB, SimQAT


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 17, 3, padding=1),
        nn.BatchNorm2d(17),
        nn.ReLU(),
        nn.Conv2d(17, 17, 3, stride=2, groups=17),
        nn.BatchNorm2d(17),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(17, 5),
    )


def _defaults(dtype: torch.dtype, device: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(dtype)
    stack.enter_context(torch.device(device))
    return stack


ALGORITHMS: dict[str, Callable[[], SimQAT | SLB | PTQ]] = {
    "simqat": SimQAT,
    "simqat of weights": lambda: SimQAT(weight="int4@channel:mse:lsq", act=None, fold_bn="two_conv"),
    "slb": lambda: SLB(weight="2bit@channel", act="uint4@tensor:pact", total_steps=3),
    "ptq of integers": lambda: PTQ(weight="int4@channel:mse", act="int8@tensor:mse"),
    "ptq of weights": lambda: PTQ(weight="int2@channel"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "dtype, device", [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")], ids=str
)
def test_networks_keep_their_bits(name: str, dtype: torch.dtype, device: str, tmp_path: Path):
    def outputs(defaults: Callable[[], AbstractContextManager[object]]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net: nn.Module = _network()
        x, other = torch.randn(2, 3, 9, 9, generator=generator), torch.randn(2, 3, 9, 9, generator=generator)
        with defaults():
            algo = ALGORITHMS[name]()
            net = algo.apply(net, x)
            if isinstance(algo, PTQ):
                algo.calibrate(net, [x, other])
            else:
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
                for batch in (x, other, x):
                    net(batch).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    algo.step()
            trained = net.eval()(x)
            net = algo.convert(net, x)
            with torch.no_grad():
                found = [trained, *(net(x) for _ in range(4))]  # from the third on as it was recorded
            gs_algos.save(net, tmp_path / "net")
        if device == "cpu":
            with defaults():
                again = gs_algos.load(tmp_path / "net", lambda: _network().float()).eval()
                found.append(again(x))
        return found

    want, got = outputs(nullcontext), outputs(lambda: _defaults(dtype, device))
    assert all(torch.equal(y, wanted) for y, wanted in zip(got, want, strict=True))
