"""A network inside torch.compile, DataParallel, DDP or inference mode is compressed, or refused in words that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gs_algos
from gs_algos import SCOP, SLB, Prune, SimQAT, quantize_weights
from gs_algos.core.algorithm import Algorithm, history
from tests.nets.convolutional import mlp

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "simqat": SimQAT,
    "lsq": lambda: SimQAT(weight="int4@channel:lsq", act="int8@tensor:lsq"),
    "slb": lambda: SLB(weight="2bit@channel", total_steps=2),
    "prune": Prune,
    "scop": lambda: SCOP(select_steps=1),
}


def vectors() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def built() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


def trained(net: nn.Module, algo: Algorithm) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    net.train()
    for _ in range(2):
        net(vectors()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    net.eval()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name, wrap", [("simqat", compiled), ("prune", compiled)])
def test_convert_of_a_compiled_network_gives_the_network_inside(name, wrap, tmp_path):
    algo = ALGORITHMS[name]()
    wrapped = wrap(algo.apply(built(), vectors()))
    trained(wrapped, algo)
    want = wrapped(vectors()).detach()
    net = algo.convert(wrapped)
    assert type(net) is nn.Sequential
    torch.testing.assert_close(net(vectors()), want, rtol=0, atol=2e-3)
    torch.testing.assert_close(wrapped(vectors()), want, rtol=0, atol=2e-3)
    assert algo.summary(wrapped) == algo.summary(net)
    gs_algos.save(wrapped, tmp_path)
    assert torch.equal(gs_algos.load(tmp_path, built).eval()(vectors()), net(vectors()))


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compile", "DataParallel"])
def test_apply_prepares_the_network_inside_and_returns_the_wrapper(wrap, make):
    net, algo = built(), make()
    wrapped = wrap(net)
    sites = [row.site for row in algo.plan(wrapped, vectors()).rows]
    assert algo.apply(wrapped, vectors()) is wrapped
    assert not any("_orig_mod" in site or "module" in site for site in sites)
    assert history(net) == history(wrapped) != []


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_ddp_is_put_around_what_apply_returns(make, process_group):
    algo = make()
    with pytest.raises(ValueError, match=r"apply: model must not be in DistributedDataParallel.*pass model\.module"):
        algo.apply(DistributedDataParallel(built()), vectors())
    wrapped = DistributedDataParallel(algo.apply(built(), vectors()))
    trained(wrapped, algo)
    assert algo.convert(wrapped) is wrapped.module


def test_quantize_weights_packs_the_network_inside(tmp_path):
    net = built()
    assert quantize_weights(compiled(net), "int8@channel") is net
    gs_algos.save(compiled(net), tmp_path)
    assert [entry["algorithm"] for entry in history(net)] == ["quantize_weights"]


@pytest.mark.parametrize("method", ["plan", "apply", "convert"])
@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_scripted_network_is_a_type_error(make, method):
    scripted = torch.jit.trace(built(), vectors())
    with pytest.raises(TypeError, match=rf"{method}: model must .* run in Python, .*; pass the network that torch.jit"):
        getattr(make(), method)(scripted, vectors())


def test_convert_names_the_prepared_network_in_a_module_of_the_users():
    algo = SimQAT()
    average = torch.optim.swa_utils.AveragedModel(algo.apply(built(), vectors()))
    with pytest.raises(RuntimeError, match=r"got one that is float around one that is not; pass .* \.module"):
        algo.convert(average)


def test_convert_says_which_algorithm_prepared_the_network():
    net = SimQAT().apply(built(), vectors())
    algo = ALGORITHMS["slb"]()
    algo.apply(built(), vectors())
    with pytest.raises(RuntimeError, match=r"SLB\.convert: .* got one that is prepared by simqat"):
        algo.convert(net)


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_what_is_made_in_inference_mode_can_be_trained_and_saved(make, tmp_path):
    algo = make()
    with torch.inference_mode():
        net = algo.apply(built_outside := outside(), vectors())
        if hasattr(algo, "calibrate"):
            algo.calibrate(net, [vectors()])
    assert net is built_outside
    trained(net, algo)
    want = net(vectors()).detach()
    with torch.inference_mode():
        algo.convert(net)
        gs_algos.save(net, tmp_path)
        again = gs_algos.load(tmp_path, built)
    assert not any(t.is_inference() for t in (*net.state_dict().values(), *again.state_dict().values()))
    torch.testing.assert_close(net(vectors()), want, rtol=0, atol=2e-3)


def outside() -> nn.Module:
    with torch.inference_mode(False):
        return built()


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_network_that_cannot_be_trained_is_refused_by_apply(make):
    with torch.inference_mode():
        net = built()
    with pytest.raises(ValueError, match=r"got 0\.weight made in torch\.inference_mode; build the network outside"):
        make().apply(net, vectors())
    with pytest.raises(ValueError, match=r"must have data, got 0\.weight on the meta device; give the network its"):
        make().apply(built().to("meta"), vectors())


class Parts(nn.Module):
    """`[B, 16] -> [B, 4]`; a part of it, or one layer, may be in torch.compile."""

    def __init__(self, wrap: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 4)
        if wrap == "part":
            self.body = compiled(self.body)
        elif wrap == "layer":
            self.body[2] = compiled(self.body[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("name", ["simqat", "slb", "prune"])
def test_a_part_that_is_compiled_is_saved_under_the_names_of_the_network(name, tmp_path):
    algo = ALGORITHMS[name]()
    net = algo.apply(Parts("part"), vectors())
    gs_algos.save(net, tmp_path / "prepared")
    assert "_orig_mod" not in (tmp_path / "prepared" / "golden_stick.json").read_text()
    for wrap in ("", "part"):  # goes on where nothing is compiled, and where it is
        again = gs_algos.load(tmp_path / "prepared", lambda wrap=wrap: Parts(wrap))
        assert ("body._orig_mod" in dict(again.named_modules())) == (wrap == "part")
        resumed = type(algo).resume(again)
        trained(again, resumed)
        again = resumed.convert(again, vectors())
        gs_algos.save(again, tmp_path / f"converted {wrap}")
        loaded = gs_algos.load(tmp_path / f"converted {wrap}", Parts)
        assert torch.equal(loaded.eval()(vectors()), again.eval()(vectors()))


def test_packed_weights_of_a_compiled_part_fit_the_plain_network(tmp_path):
    net = quantize_weights(Parts("part"), "int8@channel", progress=False)
    gs_algos.save(net, tmp_path)
    assert torch.equal(gs_algos.load(tmp_path, Parts)(vectors()), net(vectors()))


def test_a_builder_may_compile_the_whole(tmp_path):
    net = quantize_weights(Parts(), "int8@channel", progress=False)
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, lambda: compiled(Parts()))
    assert type(again).__name__ == "OptimizedModule"
    assert torch.equal(again(vectors()), net(vectors()))


@pytest.mark.parametrize("name", ["simqat", "slb"])
def test_a_layer_that_torch_compile_calls_stays_float_and_is_a_line(name, tmp_path):
    algo = ALGORITHMS[name]()
    row = next(row for row in algo.plan(Parts("layer"), vectors()).kept())
    assert row.site == "body.2._orig_mod" and "is wrapped by torch.compile" in row.reason
    net = algo.apply(Parts("layer"), vectors())
    trained(net, algo)
    net = algo.convert(net, vectors())
    gs_algos.save(net, tmp_path)
    assert torch.equal(gs_algos.load(tmp_path, Parts).eval()(vectors()), net.eval()(vectors()))
