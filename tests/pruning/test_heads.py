"""Heads: the gates and their price, the last round, the cut in every kind of attention, no training, and refusals."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import PTQ, Heads, Pipeline, Prune, SimQAT, search_rules
from gs_algos.demo.models.vit import ViT
from gs_algos.pruning.counted_attention import count_heads
from gs_algos.pruning.head_gates import chance_open, expected, sampled
from tests.nets.attention import ATTENTION, TOKENS, OwnAttention, bert, encoder, gpt2, llama, pictures, rows
from tests.nets.convolutional import mlp


def logits(net: nn.Module, x: Any) -> Tensor:
    y = net(**x) if isinstance(x, dict) else net(x)
    return getattr(y, "logits", y)


def evaluated(net: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return logits(net.eval(), x)


def train(net: nn.Module, algo, x: Any, steps: int, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    for i in range(steps):
        torch.manual_seed(i)
        logits(net, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()


def made(name: str) -> tuple[nn.Module, Any]:
    build, x = ATTENTION[name]
    torch.manual_seed(0)
    return build(), x


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(1, 4, image_size=8, patch=4, dim=24, depth=2, heads=4)


def test_gates_are_hard_concrete():
    a = torch.tensor([0.7]).expand(20000)
    torch.manual_seed(0)
    z = sampled(a)
    assert (z >= 0).all() and (z <= 1).all() and (z == 0).any() and (z == 1).any()
    # P(z > 0) = sigmoid(a - .33 log(.1 / 1.1))
    assert float((z > 0).float().mean()) == pytest.approx(
        1 / (1 + math.exp(-0.7 + 0.33 * math.log(0.1 / 1.1))), abs=0.01
    )
    assert float(chance_open(a[:1])) == pytest.approx(float((z > 0).float().mean()), abs=0.01)
    assert expected(torch.tensor([-9.0, 0.0, 3.0])).tolist() == pytest.approx([0, 0.5, 1])


def test_counted_attention_is_pytorch_s_own():
    options = itertools.product((True, False), (True, False), (True, False), (None, 6))
    for bias, first, extra, width in options:
        torch.manual_seed(0)
        net = nn.MultiheadAttention(
            12, 3, bias=bias, add_bias_kv=extra, add_zero_attn=extra, kdim=width, vdim=width, batch_first=first
        ).eval()
        q, k = torch.randn(2, 5, 12), torch.randn(2, 7, width or 12)
        q, k = (q, k) if first else (q.transpose(0, 1), k.transpose(0, 1))
        hidden = torch.tensor([[False] * 6 + [True], [False] * 7])
        later = torch.ones(5, 7).triu(1).bool()
        calls: list[dict[str, Any]] = [
            {},
            {"key_padding_mask": hidden, "attn_mask": later},
            {"attn_mask": torch.randn(6, 5, 7), "need_weights": False},
            {"attn_mask": later, "average_attn_weights": False},
        ]
        want = [net(q, k, k, **call) for call in calls] + [net(q[0], k[0], k[0])]
        count_heads(net)
        got = [net(q, k, k, **call) for call in calls] + [net(q[0], k[0], k[0])]
        for (y, weights), (own, own_weights) in zip(want, got, strict=True):
            torch.testing.assert_close(own, y)
            torch.testing.assert_close(own_weights, weights)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_cut_network_equals_the_masked_one(name, tmp_path):
    net, x = made(name)
    before = evaluated(net, x)
    algo = Heads(rate=0.5, select_steps=3, lr=0.5)
    assert str(algo.plan(net, x)).count("prune some of 4") >= 1
    net = algo.apply(net, x)
    torch.testing.assert_close(evaluated(net, x), before)  # open gates are 1
    train(net, algo, x, 5)
    want, numbers = evaluated(net, x), sum(p.numel() for p in net.parameters())
    heads = int(net.kept_units.sum()) - int((~net.kept_units).sum())
    net = algo.convert(net)
    torch.testing.assert_close(evaluated(net, x), want, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in net.parameters()) < numbers and heads >= 0
    gs_algos.save(net, tmp_path / "cut")
    loaded = gs_algos.load(tmp_path / "cut", ATTENTION[name][0])
    assert torch.equal(evaluated(loaded, x), evaluated(net, x))


@pytest.mark.parametrize("name", ["own", "bert", "llama"])
def test_without_training_the_heads_of_the_smallest_gradients_go(name):
    net, x = made(name)
    reader = {"own": "attention.out_proj", "bert": "bert.encoder.layer.0.attention.output.dense"}
    useless = net.get_submodule(reader.get(name, "model.layers.0.self_attn.o_proj")).weight
    with torch.no_grad():
        width = useless.size(1) // 4
        useless[:, width : 2 * width] = 1e-6  # nothing hangs on the second head, or pair of heads
    algo = Heads(rate=0.25, importance="gradient", scope="layer")
    assert not algo.trains
    net = algo.apply(net, x)
    parameters = {key: value.clone() for key, value in net.named_parameters()}
    algo.calibrate(net, [x, x])
    assert net.kept_units[:4].tolist() == [True, False, True, True]
    zeroed = [key for key, value in net.named_parameters() if not torch.equal(value, parameters[key])]
    assert zeroed and all((value == 0).any() or key not in zeroed for key, value in net.named_parameters())
    want = evaluated(net, x)
    net = algo.convert(net)
    torch.testing.assert_close(evaluated(net, x), want, rtol=1e-5, atol=1e-6)


def test_gradients_come_from_a_loop_of_one_s_own_too():
    results = []
    for way in ("batches", "forward_loop", "steps"):
        net, x = made("own")
        algo = Heads(rate=0.5, importance="gradient", select_steps=2)
        net = algo.apply(net, x)
        if way == "steps":
            weight = net.fc.weight.clone()
            train(net, algo, x, 2, lr=1.0)
            assert torch.equal(net.fc.weight, weight)  # still
        else:
            algo.calibrate(net, **{way: [x] if way == "batches" else lambda network: network(rows())})
        assert not algo.selecting and int(net.kept_units.sum()) == 2
        results.append(net.kept_units)
    assert torch.equal(results[0], results[1])


def test_the_price_drives_the_count_to_what_is_wanted():
    net, x = made("encoder")
    algo = Heads(rate=0.5, select_steps=400, lr=0.1)
    net = algo.apply(net, x)
    net.train()
    for i in range(399):
        torch.manual_seed(i)
        logits(net, x).square().mean().backward()  # no optimizer: weights stay
        algo.step()
        net.zero_grad()
    gates = torch.cat([m.gate.detach() for m in net.modules() if hasattr(m, "gate_price")])
    assert float(chance_open(gates).sum()) == pytest.approx(4, abs=0.5)
    best = gates.argsort(descending=True)[:4]
    algo.step()
    net = algo.convert(net)
    assert [layer.self_attn.num_heads for layer in net[0].layers] == [int((best < 4).sum()), int((best >= 4).sum())]


def test_heads_that_learned_are_kept_and_useless_ones_go():
    torch.manual_seed(0)
    net = OwnAttention(heads=4)
    with torch.no_grad():
        net.attention.out_proj.weight[:, 12:] = 0  # the last two say nothing
    x = torch.randn(64, 7, 24)
    y = evaluated(net, x).argmax(1)
    algo = Heads(rate=0.5, select_steps=150, lr=0.1)
    net = algo.apply(net, x)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(200):
        F.cross_entropy(net(x) * 4, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    assert int(net.kept_units.sum()) == 2
    net = algo.convert(net)
    assert net.attention.num_heads == 2 and net.attention.head_dim == 6
    assert float((evaluated(net, x).argmax(1) == y).float().mean()) > 0.9


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    net, x = made("encoder")
    algo = Heads(rate=0.5, select_steps=4, lr=0.5)
    net = algo.apply(net, x)
    train(net, algo, x, 3)
    gs_algos.save(net, tmp_path / "middle")
    other = gs_algos.load(tmp_path / "middle", encoder)
    assert torch.equal(evaluated(other, x), evaluated(net, x))
    again = Heads.resume(other)
    train(net, algo, x, 3)
    train(other, again, x, 3)
    assert torch.equal(evaluated(other, x), evaluated(net, x))
    assert torch.equal(evaluated(again.convert(other, x), x), evaluated(algo.convert(net), x))


def test_layers_may_lose_different_numbers_and_keep_the_floor():
    net, x = made("bert")
    algo = Heads(rate=0.9, floor=2, importance="gradient")
    net = algo.apply(net, x)
    algo.calibrate(net, [x])
    net = algo.convert(net)
    assert [layer.attention.self.num_attention_heads for layer in net.bert.encoder.layer] == [2, 2]
    net, x = made("bert")
    algo = Heads(rate=0.5, importance="gradient", rules=[("re:.*layer.1.*query", None)])
    net = algo.apply(net, x)
    algo.calibrate(net, [x])
    net = algo.convert(net)
    first, second = (layer.attention.self for layer in net.bert.encoder.layer)
    assert (first.num_attention_heads, second.num_attention_heads, second.all_head_size) == (2, 4, 24)
    assert first.query.out_features == first.all_head_size == 12


def test_shared_keys_and_values_go_with_all_their_queries():
    net, x = made("llama")
    algo = Heads(rate=0.5, scope="layer", importance="gradient")
    net = algo.apply(net, x)
    algo.calibrate(net, [x])
    net = algo.convert(net)
    attention = net.model.layers[0].self_attn
    assert [getattr(attention, f"{p}_proj").out_features for p in "qkv"] == [24, 12, 12]
    ids = {"input_ids": TOKENS, "max_new_tokens": 4, "do_sample": False}
    slow, fast = net.generate(**ids, use_cache=False), net.generate(**ids, use_cache=True)
    assert torch.equal(slow, fast)


def test_the_cut_network_exports(tmp_path):
    net, x = made("encoder")
    algo = Heads(rate=0.5, importance="gradient")
    net = algo.apply(net, x)
    algo.calibrate(net, [x])
    net = algo.convert(net).eval()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), evaluated(net, x))


@pytest.mark.parametrize(
    "after", [SimQAT, lambda: PTQ(weight="int8@channel", act="int8@tensor")], ids=["simqat", "ptq"]
)
def test_quantized_after_it_in_a_pipeline(after, tmp_path):
    x = pictures().repeat(4, 1, 1, 1)

    def work(net: nn.Module, stage) -> None:
        if stage.algorithm.trains:
            train(net, stage.algorithm, x, 3)
        else:
            stage.algorithm.calibrate(net, [x])

    stages = [Heads(rate=0.5, select_steps=2), after()]
    net = Pipeline(stages, tmp_path / "stages").run(small_vit(), x, work)
    assert sum(block.attention.heads for block in net.blocks) == 4
    loaded = gs_algos.load(tmp_path / "stages" / f"2-{stages[1].name}", small_vit)
    assert torch.equal(evaluated(loaded, x), evaluated(net, x))


def test_a_search_finds_its_rates():
    algo = Heads(importance="gradient")
    x = pictures()
    policy = search_rules(small_vit(), x, algo, [x], budget="90% macs", evaluations=6, choices=(0.0, 0.5))
    (found,) = policy.algorithms()
    assert found.config.rules and all("qkv" in site for site, _ in found.config.rules)
    net = found.apply(small_vit(), x)
    found.calibrate(net, [x])
    net = found.convert(net)
    left = [block.attention.heads for block in net.blocks]
    assert min(left) == 2 and all(n in (2, 4) for n in left)


def test_prune_cuts_heads_of_multihead_attention_too():
    net, x = made("encoder")
    algo = Prune(rate=0.5)
    net = algo.convert(algo.apply(net, x))
    assert [layer.self_attn.num_heads for layer in net[0].layers] == [2, 2]


def test_a_mask_per_head_of_the_whole_network_is_refused_after_the_cut():
    net = OwnAttention()
    net = (algo := Prune(rate=0.5)).convert(algo.apply(net, rows()))
    with pytest.raises(
        ValueError, match=r"attn_mask must have batch \* heads = 4 rows after some heads were cut, got 8"
    ):
        net.attention(rows(), rows(), rows(), attn_mask=torch.zeros(8, 7, 7))


def test_the_plan_says_why_the_rest_stays():
    reasons = {row.site: row.reason for row in Heads().plan(bert(), {"input_ids": TOKENS}).rows}
    assert reasons["bert.encoder.layer.0.intermediate.dense"] == "is not made of attention heads"
    assert "output" in reasons["classifier"]
    reasons = {row.site: row.reason for row in Heads().plan(bert(heads=1), {"input_ids": TOKENS}).rows}
    assert "has its size written into the model's code" in reasons["bert.encoder.layer.0.attention.self.query"]


@torch.library.custom_op("tests_heads::fused", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).contiguous()


class Fused(OwnAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.attention.in_proj_weight).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return self.fc(self.attention.out_proj(fused(q, k, v).transpose(1, 2).flatten(2)).mean(1))


class Tied(nn.Module):
    """One projection makes queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query, self.value, self.out = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.key = self.query

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def test_tied_projections_are_cut_once():
    net = Tied()
    algo = Heads(rate=0.5, importance="gradient")
    net = algo.apply(net, rows())
    algo.calibrate(net, [rows()])
    want = evaluated(net, rows())
    net = algo.convert(net)
    torch.testing.assert_close(evaluated(net, rows()), want, rtol=1e-5, atol=1e-6)
    assert net.key is net.query and net.query.out_features == 12 and net.num_heads == 2


def packed() -> nn.Module:
    algo = PTQ(weight="int8@channel")
    net = algo.apply(small_vit(), pictures())
    algo.calibrate(net, [pictures()])
    return algo.convert(net)


@pytest.mark.parametrize(
    "build, x, words",
    [
        (mlp, torch.randn(2, 16), "is not made of attention heads"),
        (lambda: bert(heads=1), {"input_ids": TOKENS}, "has its size written into the model's code"),
        (Fused, rows(), "no rule for the operation tests_heads::fused"),
        (packed, pictures(), "packed"),
    ],
    ids=["no attention", "one head", "fused", "packed"],
)
def test_a_network_without_heads_to_cut_is_refused_and_left_alone(build, x, words):
    net = build()
    before, kinds = evaluated(net, x), [type(m) for m in net.modules()]
    steps = len(gs_algos.history(net))
    with pytest.raises(ValueError, match=rf"(?s)Heads\.apply: at least one group must lose a unit, got none.*{words}"):
        Heads().apply(net, x)
    assert torch.equal(evaluated(net, x), before) and [type(m) for m in net.modules()] == kinds
    assert len(gs_algos.history(net)) == steps


@pytest.mark.parametrize(
    "options, words",
    [
        ({"importance": "taylor"}, "Heads: importance must be gates or gradient, got 'taylor'"),
        ({"select_steps": 0}, "Heads: select_steps must be >= 1, got 0; gates need gradients"),
        ({"lr": 0}, "Heads: lr must be > 0, got 0"),
        ({"rate": 1.5}, r"Heads: rate must be in \[0, 1\), got 1.5"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Heads(**options)


def test_a_budget_that_heads_cannot_meet_is_refused():
    with pytest.raises(ValueError, match="must be one that the network can meet, got 20% flops; the least"):
        Heads(budget="20% flops").plan(*made("bert"))


def test_calibrate_is_refused_where_nothing_would_be_known():
    net, x = made("own")
    algo = Heads(rate=0.5, importance="gradient")
    with pytest.raises(RuntimeError, match="must come between apply and convert"):
        algo.calibrate(net, [x])
    algo.apply(net, x)
    for batches, words in (
        ([], "at least one batch must run"),
        ([torch.full_like(x, torch.nan)], "logits must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            algo.calibrate(net, batches)
        assert algo.selecting and net.kept_units.all()
    with pytest.raises(ValueError, match="must run with gradients on, got none"), torch.no_grad():
        algo.calibrate(net, forward_loop=lambda network: _without_gradients(network, x))
    gates, other = Heads(rate=0.5), OwnAttention()
    gates.apply(other, x)
    with pytest.raises(RuntimeError, match="gates must be trained by steps"):
        gates.calibrate(other, [x])


@torch.no_grad()
def _without_gradients(network: nn.Module, x: Tensor) -> None:
    network(x)


def test_scores_that_are_not_numbers_are_refused():
    net, x = made("own")
    algo = Heads(rate=0.5, select_steps=2)
    algo.apply(net, x)
    train(net, algo, x, 1)
    with torch.no_grad():
        net.attention.gate[1] = torch.nan
    with pytest.raises(RuntimeError, match="Heads: scores of heads must be finite, got nan or inf at attention"):
        train(net, algo, x, 1)


def test_steps_without_gradients_are_refused():
    net, x = made("own")
    algo = Heads(rate=0.5, select_steps=2)
    algo.apply(net, x)
    algo.step()
    with pytest.raises(RuntimeError, match="the first 2 steps must show how much each channel matters"):
        algo.step()


def test_gpt2_counts_what_its_split_needs():
    net, x = gpt2(), {"input_ids": TOKENS}
    algo = Heads(rate=0.5, scope="layer", importance="gradient")
    algo.calibrate(algo.apply(net, x), [x])
    net = algo.convert(net)
    attention = net.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (2, 12, 36, 12)
    assert llama().config.num_attention_heads == 8


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e["groups"]["groups"][0].update(readers=[3]), "readers must be names of layers, got"),
        (
            lambda e: e["groups"]["groups"][0].update(readers=["fc"]),
            "read by no layer, not by one layer whose",
        ),
        (lambda e: e["groups"]["groups"][0].update(heads=False), "attention must read the heads of a group, got none"),
        (lambda e: e["gates"].update(attention=4), "attention must have 4 channels; the model is another one"),
        (lambda e: e["gates"].update(fc=24), "fc must read the heads of a group, got none"),
    ],
)
def test_a_hostile_history_is_a_value_error(change, words, tmp_path):
    net, x = made("own")
    gs_algos.save(Heads(rate=0.5).apply(net, x), tmp_path)
    index = json.loads((tmp_path / "golden_stick.json").read_text())
    change(index["history"][0])
    (tmp_path / "golden_stick.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        gs_algos.load(tmp_path, OwnAttention)


def test_a_budget_sets_how_many_gates_stay_open():
    net, x = made("encoder")
    algo = Heads(budget="85% flops", select_steps=4, lr=0.2)
    net = algo.apply(net, x)
    train(net, algo, x, 5)
    net = algo.convert(net)
    assert sum(layer.self_attn.num_heads for layer in net[0].layers) == 6
