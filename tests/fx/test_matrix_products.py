"""Matrix products with a parameter become layers, which are trained, packed, saved and loaded as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.qat.slb.optim import SlbSGD
from gs_algos.quant.packed.module import Packed

ALGORITHMS = {
    "weights": lambda: SimQAT(weight="int8@channel", act=None),
    "integers": lambda: SimQAT(weight="int8@channel", act="int8@tensor:ema"),
    "groups": lambda: SimQAT(weight="int4@group:2", act=None),
    "slb": lambda: SLB(weight="2bit@channel", total_steps=1),
    "slb, fused": lambda: SLB(weight="2bit@channel", total_steps=1, fused=True),
}
PRODUCTS = {
    "linear": (lambda s, x: F.linear(x, s.w, s.b), False),
    "turned linear": (lambda s, x: F.linear(x, s.w.t(), s.b), True),
    "matmul": (lambda s, x: torch.matmul(x, s.w) + s.b, True),
    "operator": (lambda s, x: x @ s.w, True),
    "operator, turned": (lambda s, x: x @ s.w.T + s.b, False),
    "method": (lambda s, x: x.matmul(s.w.transpose(0, 1)), False),
    "mm": (lambda s, x: torch.mm(x.flatten(0, 1), s.w).unflatten(0, x.shape[:2]), True),
    "addmm": (lambda s, x: torch.addmm(s.b, x.view(-1, 6), s.w).view(x.shape[0], -1, 4), True),
    "einsum": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), False),
    "einsum, other letters": (lambda s, x: torch.einsum("btk, kn -> btn", x, s.w), True),
}


class Net(nn.Module):
    """`[B, T, 6] -> [B, T, 3]`, its first layer a function; `[4, 6]` is its matrix, or `[6, 4]`."""

    def __init__(self, product: Any, turned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 4) if turned else torch.randn(4, 6))
        self.b, self.fc = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.product(self, x)))


def tokens() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def goes_all_the_way(build: Any, algo: Any, inputs: Any, folder: Any) -> nn.Module:
    """Plan, apply, a step, save and load, convert, save and load; every float state_dict key stays for SimQAT."""
    net, keys = build(), list(build().state_dict())

    def run(net: nn.Module) -> Tensor:
        output = net(**inputs) if isinstance(inputs, dict) else net(inputs)
        return output if isinstance(output, Tensor) else output.logits

    parameters = dict(net.named_parameters())
    net = algo.apply(net, inputs)
    if isinstance(algo, SimQAT):
        assert set(keys) <= net.state_dict().keys()
        assert all(dict(net.named_parameters())[name] is p for name, p in parameters.items())
    fused = algo.fused_layers() if isinstance(algo, SLB) else []
    rest = algo.parameters(net) if isinstance(algo, SLB) and fused else net.parameters()
    optimizers = [torch.optim.SGD(rest, lr=0.05), *([SlbSGD(fused, lr=0.05)] if fused else [])]
    run(net.train()).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    algo.step()
    with torch.no_grad():
        want = run(net.eval())
        prepared = gs_algos.load(gs_algos.save(net, folder / "prepared"), build).eval()
        assert torch.equal(run(prepared), want)
        net = algo.convert(net)
        got = run(net)
        assert (got - want).norm() <= 1e-6 * want.norm()
        converted = gs_algos.load(gs_algos.save(net, folder / "converted"), build).eval()
        assert torch.equal(run(converted), got)
    return net


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_a_layer_that_is_packed(product, algorithm, tmp_path):
    net = goes_all_the_way(lambda: Net(*PRODUCTS[product]), ALGORITHMS[algorithm](), tokens(), tmp_path)
    packed = [module.shape for module in net.modules() if isinstance(module, Packed)]
    assert sorted(packed) == [(3, 4), (4, 6)] and "w" not in net.state_dict()


CHAINS = {
    "low rank": lambda s, x: x @ s.a @ s.b,
    "low rank with biases": lambda s, x: (x @ s.a + s.c) @ s.b + s.d,
    "functions": lambda s, x: torch.einsum("bti,io->bto", F.linear(x, s.a.t(), s.c), s.b),
}


class Chain(nn.Module):
    """`[B, T, 6] -> [B, T, 3]`, products that nothing separates before a layer."""

    def __init__(self, products: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))
        self.c, self.d, self.fc = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.products(self, x))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("products", CHAINS)
def test_a_product_of_a_product_is_a_layer(products, algorithm, tmp_path):
    net = goes_all_the_way(lambda: Chain(CHAINS[products]), ALGORITHMS[algorithm](), tokens(), tmp_path)
    packed = [module.shape for module in net.modules() if isinstance(module, Packed)]
    assert sorted(packed) == [(2, 6), (3, 4), (4, 2)]


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def falcon() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    drops = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(**sizes, **drops, bias=True, bos_token_id=0, eos_token_id=0)
    )


LANGUAGE = {
    gpt2: ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"],
    falcon: [
        *("h.0.self_attention.query_key_value", "h.0.self_attention.dense"),
        *("h.0.mlp.dense_h_to_4h", "h.0.mlp.dense_4h_to_h"),
    ],
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("build", LANGUAGE)
def test_layers_that_a_library_made_its_own_way_keep_their_names(build, algorithm, tmp_path):
    net = goes_all_the_way(build, ALGORITHMS[algorithm](), {"input_ids": torch.arange(1, 13).view(2, 6)}, tmp_path)
    packed = [name for name, module in net.named_modules() if isinstance(module, Packed)]
    assert packed == [f"transformer.{name}" for name in LANGUAGE[build]]


def test_a_rule_may_name_such_a_layer():
    plan = SimQAT(rules=[("re:.*c_attn", None)]).plan(gpt2(), {"input_ids": torch.arange(1, 13).view(2, 6)})
    assert "transformer.h.0.attn.c_attn" not in [row.site for row in plan.acted()]


def test_planning_products_touches_nothing():
    net = gpt2()
    modules, kinds = dict(net.named_modules()), [type(module) for module in net.modules()]
    for algo in (SimQAT(), SLB()):
        algo.plan(net, {"input_ids": torch.arange(1, 13).view(2, 6)})
    assert dict(net.named_modules()) == modules and [type(module) for module in net.modules()] == kinds


KEPT = {
    "einsum that sums twice": lambda s, x: torch.einsum("bti,oi->bo", x, s.w)[:, None],
    "computed": lambda s, x: x @ (s.w * 2).T,
    "scaled addmm": lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w.T, beta=2).unflatten(0, x.shape[:2]),
}


@pytest.mark.parametrize("product", KEPT)
def test_a_product_that_is_no_linear_stays_float_and_is_a_line(product):
    plan = SimQAT().plan(Net(KEPT[product], False), tokens())
    assert [row.site for row in plan.acted() if row.kind == "Linear"] == ["fc"] and "w" not in plan.acted()
    assert any(row.reason for row in plan.kept())


class Matrices(nn.Module):
    """Matrices of its own, which no layer multiplies by: a masked one and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.masked = nn.Linear(6, 6), nn.Parameter(torch.ones(6, 6))
        self.experts = nn.Parameter(torch.ones(2, 6, 3))
        self.register_buffer("mask", torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eio->bto", F.linear(self.fc(x), self.masked * self.mask), self.experts)


@pytest.mark.parametrize("inside", [False, True])
def test_every_matrix_that_stays_float_is_a_line_of_its_name(inside):
    plan = SimQAT().plan(nn.Sequential(Matrices()) if inside else Matrices(), tokens())
    prefix = "0." if inside else ""
    assert {row.site for row in plan.kept()} == {f"{prefix}masked", f"{prefix}experts"}


def test_a_fused_optimizer_trains_a_matrix_that_is_turned():
    net, algo = Net(*PRODUCTS["matmul"]), SLB(weight="2bit@channel", fused=True, total_steps=100)
    dense = net.w.detach().clone()
    net.b.requires_grad_(False)
    net = algo.apply(net, tokens())
    layer = net.w_matmul
    assert not algo.plan(Net(*PRODUCTS["matmul"]), tokens()).kept()
    assert layer._parameters["weight"].shape == (4, 6) and not net.b.requires_grad
    before = layer.weight.detach().clone()
    assert torch.corrcoef(torch.stack([before.flatten(), dense.t().flatten()]))[0, 1] > 0.9
    net(tokens()).square().mean().backward()
    SlbSGD(algo.fused_layers(), lr=100.0).step()
    algo.step()
    assert not torch.equal(layer.weight, before)


def test_a_frozen_matrix_that_is_turned_stays_frozen():
    net, algo = Net(*PRODUCTS["matmul"]), SLB(weight="2bit@channel", fused=True, total_steps=100)
    net.w.requires_grad_(False)
    net = algo.apply(net, tokens())
    assert not net.w_matmul._parameters["weight"].requires_grad and not net.w_matmul.search.logits.requires_grad
