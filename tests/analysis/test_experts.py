"""Mixtures of experts: those that are modules have rows, those that share a parameter are said to stay float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.analysis.compare import compare
from gs_algos.analysis.sensitivity import sensitivity


class Mixture(nn.Module):
    """Sends each row to one of three experts; the last one never gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                y[chosen == number] = expert(x[chosen == number])
        return self.head(y)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Mixture().eval()


@pytest.fixture
def batches():
    return list(torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(params=["MixtralConfig", "Qwen3MoeConfig"])
def stacked(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    experts = {"num_local_experts": 4} if request.param == "MixtralConfig" else {"num_experts": 4}
    config = getattr(transformers, request.param)(
        **sizes, **experts, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def windows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 16), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("by", ["kl", "gradient", "nsr"])
def test_each_expert_has_a_score_and_an_idle_one_none_above_0(net, batches, by):
    scores = sensitivity(net, batches, ("int2@channel",), by=by).scores
    experts = {f"experts.{number}.{layer}" for number in range(3) for layer in (0, 2)}
    assert scores.keys() == {"router", "head", *experts}
    assert all((min(scores[site].values()) > 0) == (site[8] != "2") for site in experts)


def test_each_expert_is_compared_and_an_idle_one_is_named(net, batches):
    found = compare(net, gs_algos.quantize_weights(copy.deepcopy(net), "int4@channel", progress=False), batches)
    rows = {one.site: one for one in found.layers}
    assert rows["experts.0.0"].sqnr > 5 and rows["experts.2.0"].sqnr is None
    assert any(note == "2 layers did not run on these inputs: experts.2.0, experts.2.2" for note in found.notes)


def test_experts_that_share_a_parameter_are_said_to_stay_float(stacked):
    rules = [("re:.*experts.*", None)]
    new = gs_algos.quantize_weights(copy.deepcopy(stacked), "int4@group:32", rules=rules, progress=False)
    found = gs_algos.report(stacked, new, windows(), seconds=0.0)
    held = sum(p.numel() for name, p in new.named_parameters() if ".experts." in name)
    assert f"2 parameters of several weights each, such as experts, stay float ({held:,} weights): model.l" in str(
        found
    )
    assert str(found).count("such as experts") == found.html().count("such as experts") == 1


def test_stacks_that_are_packed_are_layers_of_the_report(stacked):
    new = gs_algos.quantize_weights(copy.deepcopy(stacked), "int4@group:32", progress=False)
    found = gs_algos.report(stacked, new, windows(), seconds=0.0)
    assert "such as experts, stay float" not in str(found) and "experts.gate_up_proj" in str(found)


def test_an_analysis_says_which_experts_it_has_no_scores_of(stacked):
    found = gs_algos.analyze(stacked, windows()[0], windows(), choices=("int2@channel", "int8@channel"))
    assert str(found).count("experts.gate_up_proj") == 1 and "such as experts" in found.html()
    assert "such as experts" in str(found.sensitivity)
