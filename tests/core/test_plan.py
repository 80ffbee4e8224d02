"""Plans leave no weight out, say what they come to, and name a layer of many blocks once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.core.algorithm import Algorithm
from gs_algos.core.modules import own_forward
from gs_algos.core.plan import Plan, PlanRow, other_weights, render_layers, totals_of


class Experts(nn.Module):
    """Four matrices in one parameter, as Transformers keeps the experts of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.ones(4, 6, 8)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,enk->bn", x, self.up) * self.scale


class Mixture(nn.Module):
    """`[B, T] -> [B, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.norm = nn.Embedding(5, 8), Experts(), nn.LayerNorm((1, 6))
        self.first, self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.experts(self.first(self.embed(ids).mean(1)))
        return self.head(self.norm(x[:, None])[:, 0])


def blocks(n: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(n)))


@pytest.mark.parametrize("algo", [SimQAT(), SLB(weight="2bit@channel", total_steps=1, ends="same")])
def test_every_matrix_has_a_row_with_what_is_done_or_why_not(algo: Algorithm):
    rows = {row.site: row for row in algo.plan(Mixture(), torch.tensor([[1, 2], [3, 4]])).rows}
    assert rows["head"].action != "keep" and "norm" not in rows
    assert rows["embed"].reason == "is a table whose rows are looked up, not multiplied"
    assert "stack of 4 matrices that the forward of Experts reads" in rows["experts.up"].reason
    assert rows["first"].action == "keep" and "experts.scale" not in rows


def test_the_reason_of_a_weight_says_where_it_is_multiplied():
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "gru": nn.GRU(8, 8), "pair": nn.Bilinear(2, 3, 4)})
    net["list"] = nn.ModuleList([nn.ParameterList([torch.ones(2, 2)])])
    net["old"], net["new"] = (
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    )
    reasons = {row.site: row.reason for row in other_weights(net, [])}
    assert reasons.keys() == {
        "attn.in_proj_weight", "attn.out_proj", "gru.weight_ih_l0", "gru.weight_hh_l0", "pair", "old", "new", "list.0.0"
    }  # fmt: skip
    assert reasons["attn.in_proj_weight"] == "is multiplied inside nn.MultiheadAttention, not by a layer"
    assert reasons["gru.weight_ih_l0"] == "is multiplied inside nn.GRU, not by a layer"
    assert "comes from SpectralNorm" in reasons["old"]
    assert "comes from Orthogonal" in reasons["new"]


def test_a_row_speaks_of_the_parameters_of_its_module_of_those_tied_to_them_and_of_one_it_names():
    net = Mixture()
    net.tied = nn.Linear(8, 5)
    net.tied.weight = net.embed.weight
    rows = [PlanRow(name, "", "keep") for name in ("embed", "first", "experts.up")]
    assert [row.site for row in other_weights(net, rows)] == ["head"]


def test_totals_count_each_number_and_its_bytes_once():
    net = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4).half(), "c": nn.Linear(8, 4, bias=False)})
    net["c"].weight = net["a"].weight
    totals = totals_of(net, {"a": 20})
    assert (totals.numbers, totals.quantized) == (32 + 4 + 36, 32)
    assert (totals.before, totals.after) == (36 * 4 + 36 * 2, 20 + 4 * 4 + 36 * 2)


def test_the_text_ends_with_the_totals():
    line = str(SimQAT(rules=[("2", None)]).plan(blocks(3), torch.randn(2, 8))).splitlines()[-1]
    assert line == (
        "weights: 256 of 432 numbers are quantized (59.3 %), 176 stay float (40.7 %); 1,728 bytes before, 1,088 after"
    )


def test_the_bytes_after_are_those_of_the_converted_weights():
    x, net, algo = torch.randn(2, 8), blocks(2), SimQAT(weight="int4@group:4:asym")
    after = algo.plan(net, x).totals.after  # type: ignore[union-attr]
    net = algo.convert(algo.apply(net, x))
    layers = [layer for layer in net.modules() if hasattr(layer, "nbytes")]
    assert after == sum(layer.nbytes + 8 * 4 for layer in layers)  # and a bias each


def test_a_layer_of_many_blocks_is_one_line_with_a_count():
    net = blocks(12)
    text = str(SimQAT(rules=[("5.2", None)]).plan(net, torch.randn(2, 8))).splitlines()
    lines = [line.split("  ")[0] for line in text[3:-1]]
    assert lines == ["0.0 ... 11.0", "0.2 ... 4.2", "5.2", "6.2 ... 11.2"]
    assert text[3].split()[3:5] == ["12", "Linear"] and text[0].startswith("simqat: 23 of 24 layers")


def test_names_in_other_columns_do_not_keep_lines_apart_but_numbers_do():
    rows = [(f"blocks.{i}.conv", f"with blocks.{i}.norm", "0.5", 10 * (i // 2)) for i in range(4)]
    assert [line.split() for line in render_layers(("layer", "with", "rate", "bytes"), rows).splitlines()[::2]] == [
        ["layer", "count", "with", "rate", "bytes", "each"],
        ["blocks.0.conv", "...", "blocks.1.conv", "2", "with", "blocks.0.norm", "0.5", "0"],
    ]


def test_layers_of_one_list_are_lines_of_their_own():
    rows = tuple(PlanRow(f"net.{i}", "Linear", "pack") for i in range(3))
    assert len(str(Plan("x", "", rows)).splitlines()) == 1 + 2 + 3


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize("algo", [SimQAT(), SLB(weight="2bit@channel", total_steps=1, ends="same")])
def test_a_layer_that_computes_in_a_way_of_its_own_stays_float(algo: Algorithm):
    net = nn.Sequential(Standardized(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    plain = net[1].forward
    net[1].forward = lambda x: 2 * plain(x)  # as accelerate does it
    plan = algo.plan(net, torch.randn(2, 3, 8, 8))
    assert [row.site for row in plan.acted()] == ["2"]
    assert own_forward(net[0], nn.Conv2d) == "Standardized has a _conv_forward of its own"
    assert own_forward(net[1], nn.Conv2d) == "its forward was replaced on the object"
    assert own_forward(net[2], nn.Conv2d) == ""


def test_position_embeddings_are_no_stack_of_matrices():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.positions = nn.Linear(4, 4), nn.Parameter(torch.ones(1, 3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + self.positions)

    (row,) = gs_algos.plan_weights(Positions(), "int8@channel").kept()
    assert (row.site, row.reason) == ("positions", "is read by the forward of Positions itself, not by a layer")


def test_the_old_name_of_the_tracer_works_with_a_warning():
    plan = Plan("x", "export", ())
    with pytest.warns(DeprecationWarning, match=r"Plan\.rung is now Plan\.tracer"):
        assert plan.rung == plan.tracer == "export"
