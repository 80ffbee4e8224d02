"""What ordinary code does with a converted network: gradients, TorchScript, transforms, the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gs_algos import SLB, SimQAT, quantize_weights
from tests.helpers import relative_rms


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.fc(self.c(x + self.b(x)).mean((-2, -1)))


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(5))


def prepared(make: Callable[[], Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    algo = make()
    net = algo.apply(Net(), drawn(4, 3, 10, 10))
    algo.step()
    return net.eval(), algo


CONVERTED: dict[str, Callable[[], nn.Module]] = {
    "8 bits": lambda: _converted(SimQAT),
    "weights alone": lambda: _converted(lambda: SimQAT(act=None)),
    "searched": lambda: _converted(lambda: SLB(weight="2bit@channel", total_steps=1)),
    "packed": lambda: quantize_weights(Net().eval(), "int8@channel"),
}


def _converted(make: Callable[[], Any]) -> nn.Module:
    net, algo = prepared(make)
    return algo.convert(net)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=CONVERTED)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return CONVERTED[request.param]()


@pytest.mark.parametrize("act", ["int8@tensor:ema", "uint8@tensor:ema", None])
def test_the_input_gets_the_gradient_that_the_trained_network_gives_it(act: str | None):
    net, algo = prepared(lambda: SimQAT(act=act))
    x = drawn(2, 3, 10, 10).requires_grad_()
    y = net(x)
    (want,) = torch.autograd.grad(y[:, 0].sum(), x)
    net = algo.convert(net)
    got = net(x)
    assert relative_rms(got.detach(), y.detach()) < 1e-2
    (gradient,) = torch.autograd.grad(got[:, 0].sum(), x)
    assert relative_rms(gradient, want) < 1e-4
    assert not net(x.detach()).requires_grad


def test_a_checkpoint_recomputes_a_converted_network(net: nn.Module):
    x, again = (drawn(2, 3, 10, 10).requires_grad_() for _ in range(2))
    net(x).sum().backward()
    checkpoint(net, again, use_reentrant=False).sum().backward()
    assert x.grad is not None and again.grad is not None and relative_rms(again.grad, x.grad) < 1e-6


def test_torchscript_traces_a_converted_network_for_every_batch(net: nn.Module):
    traced = torch.jit.trace(net, drawn(2, 3, 10, 10))
    x = drawn(5, 3, 10, 10)
    assert relative_rms(traced(x), net(x)) < 1e-5


def test_a_transform_of_torch_func_sees_floats(net: nn.Module):
    x = drawn(3, 3, 10, 10)
    got = torch.func.vmap(net)(x)
    assert got.shape == (3, 4) and relative_rms(got, net(x)) < 1e-5


def test_a_network_on_the_meta_device_says_the_shape(net: nn.Module):
    y = copy.deepcopy(net).to("meta")(torch.empty(2, 3, 10, 10, device="meta"))
    assert y.is_meta and y.shape == (2, 4)


@pytest.mark.parametrize("view", [lambda x: x[..., ::2], lambda x: x.mT, lambda x: x[:, :1].expand(-1, 3, -1, -1)])
def test_images_of_any_strides_give_the_same(net: nn.Module, view: Callable[[Tensor], Tensor]):
    x = view(drawn(2, 3, 10, 20))
    assert relative_rms(net(x), net(x.contiguous())) < 1e-6
    one = net(x[0])  # without a batch
    assert one.shape == (4,) and relative_rms(one, net(x)[0]) < 1e-5


def test_an_input_of_another_kind_is_refused_in_words(net: nn.Module):
    for dtype, name in ((torch.float64, "float64"), (torch.int64, "int64")):
        with pytest.raises(TypeError, match=f"must be float32 / float16 / bfloat16, got {name}; cast"):
            net(drawn(2, 3, 10, 10).to(dtype))


@pytest.mark.parametrize("act", [None, "int8@tensor:ema"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_what_a_converted_layer_gives_may_be_changed_in_place_with_gradients(act, rows):
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    algo = SimQAT(act=act)
    net = algo.convert(algo.apply(nn.Sequential(nn.Linear(8, 8)), x).eval())
    x = x[:rows].requires_grad_()
    want = net(x) + 1
    y = net(x)
    y += 1
    y.sum().backward()
    assert torch.equal(y, want) and x.grad is not None and x.grad.shape == x.shape
