"""What a first user gives that cannot work is answered in words that say what to do; what is right works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SCOP, SLB, Prune, SimQAT
from gs_algos.core.algorithm import Algorithm


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def slb(**options: Any) -> SLB:
    return SLB(weight="int2@channel", total_steps=2, **options)


QUANTIZE: dict[str, Callable[..., Algorithm]] = {"simqat": SimQAT, "slb": slb}
EVERY: dict[str, Callable[..., Algorithm]] = {**QUANTIZE, "scop": lambda: SCOP(select_steps=1), "prune": Prune}


@pytest.mark.parametrize("make", QUANTIZE.values(), ids=QUANTIZE)
def test_a_float64_network_is_told_to_be_cast(make):
    algo, model = make(), net().double()
    words = r"its weight is float64, and must be float32, float16 or bfloat16: call net\.float\(\) first"
    assert [row.reason for row in algo.plan(model, inputs().double()).rows] == [words.replace("\\", "")] * 2
    with pytest.raises(ValueError, match=rf"apply: at least one layer must be quantizable, got none:(.|\n)*{words}"):
        algo.apply(model, inputs().double())
    algo.apply(model.float(), inputs())


@pytest.mark.parametrize("make", QUANTIZE.values(), ids=QUANTIZE)
def test_a_prepared_network_cast_to_float64_is_told_to_be_cast_back(make):
    algo = make()
    model = algo.apply(net(), inputs()).double()
    with pytest.raises(ValueError, match=r"convert: layers must be in float32.* got 0 in float64; call net\.float\(\)"):
        algo.convert(model, inputs().double())
    algo.convert(model.float())


@pytest.mark.parametrize("make", QUANTIZE.values(), ids=QUANTIZE)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_a_prepared_network_is_converted_in_the_dtype_it_was_cast_to(make, cast):
    algo = make()
    model = algo.convert(algo.apply(net(), inputs()).to(cast), inputs().to(cast))
    assert model(inputs().to(cast)).dtype == cast


@pytest.mark.parametrize("make", QUANTIZE.values(), ids=QUANTIZE)
def test_the_example_of_convert_is_inputs_alone(make):
    algo = make()
    model = algo.apply(net(), inputs())
    with pytest.raises(ValueError, match=r"inputs must run .*; a tuple is positional inputs: leave labels out"):
        algo.convert(model, (inputs(), torch.zeros(4)))
    with pytest.raises(ValueError, match="inputs must run through the model, got AttributeError"):
        algo.convert(model, "inputs")
    algo.convert(model, {"input": inputs()[:2]})


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_lazy_module_is_named(make):
    with pytest.raises(ValueError, match=r"apply: .* got 0\.weight of a lazy one; run one forward pass first"):
        make().apply(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)), inputs())


@pytest.mark.parametrize("make", QUANTIZE.values(), ids=QUANTIZE)
@pytest.mark.parametrize(
    "norm, reason",
    [
        (nn.utils.weight_norm, r"computed by a hook"),
        (nn.utils.spectral_norm, r"computed by a hook"),
        (nn.utils.parametrizations.weight_norm, "re-parametrized"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_layer_whose_weight_is_computed_stays_float(norm, reason, make):
    model, algo = nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)), make()
    kept = [row for row in algo.plan(model, inputs()).kept() if row.site == "0"]
    assert len(kept) == 1 and reason in kept[0].reason
    algo.convert(algo.apply(model, inputs()))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_hooks_act_and_are_removed_behind_convert(make):
    model, algo, seen = net(), make(), []
    algo.apply(model, inputs())
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: seen.append("pre")),
        model[0].register_forward_hook(lambda module, args, y: seen.append("post")),
        model[2].register_forward_hook(lambda module, args, y: 2 * y),
    ]
    model.train()(inputs()).square().mean().backward()
    algo.step()
    want = model.eval()(inputs()).detach()
    algo.convert(model)
    seen.clear()
    doubled = model(inputs())
    torch.testing.assert_close(doubled, want, rtol=0, atol=1e-2)
    assert seen == ["pre", "post"]
    for handle in handles:
        handle.remove()
    assert torch.equal(2 * model(inputs()), doubled) and seen == ["pre", "post"]


NOTHING_TO_CUT: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "rate 0": (net(), {"rate": 0}, "; give a higher rate, or a smaller round_to:\n"),
    "round_to": (net(), {"round_to": 64}, "; give a higher rate, or a smaller round_to:\n"),
    "one layer": (nn.Sequential(nn.Linear(8, 4)), {}, r":\n(.|\n)*is an output of the network"),
    "no layer": (nn.Sequential(nn.ReLU()), {}, "; the network has no layer whose channels nothing else needs$"),
}


@pytest.mark.parametrize("model, options, words", NOTHING_TO_CUT.values(), ids=NOTHING_TO_CUT)
def test_prune_says_why_nothing_can_go(model, options, words):
    with pytest.raises(ValueError, match=rf"Prune\.apply: at least one group must lose a unit, got none.*{words}"):
        Prune(**options).apply(model, inputs())


RATES = {50: "got 50; use 0.5", "50%": "got '50%'; use 0.5", "0.3": "got '0.3'; use 0.3", 1: "got 1$", -1: "got -1$"}


@pytest.mark.parametrize("rate, words", RATES.items())
def test_a_rate_in_percent_is_answered_with_the_share(rate, words):
    with pytest.raises(ValueError, match=rf"Prune: rate must be in \[0, 1\), {words}"):
        Prune(rate=rate)


def test_a_budget_given_as_a_share_is_answered_with_the_text():
    with pytest.raises(ValueError, match=r"got 0\.5; use '50% flops'"):
        Prune(budget=0.5)


@pytest.mark.parametrize("make", [SimQAT, Prune])
def test_examples_that_are_no_inputs_are_answered_with_what_to_give(make):
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs(), inputs()))
    for example, words in (
        (pairs, r"; give the inputs of one call, those of next\(iter\(loader\)\)"),
        ((inputs(), torch.zeros(4)), "; a tuple is positional inputs: leave labels out"),
        (inputs().numpy(), r"; give a tensor, torch\.from_numpy\(x\)"),
    ):
        with pytest.raises(ValueError, match=f"must run through the model, got .*{words}"):
            make().plan(net(), example)


@pytest.mark.parametrize("make", [SimQAT, Prune])
def test_an_algorithm_that_went_on_says_how_the_model_before_is_converted(make, caplog):
    algo = make()
    first, second = algo.apply(net(), inputs()), algo.apply(net(), inputs())
    algo.convert(second)
    with pytest.raises(
        RuntimeError, match=r"convert: the model must be the one that the algorithm trains, got another"
    ):
        algo.convert(first)
    make.resume(first).convert(first, inputs())
