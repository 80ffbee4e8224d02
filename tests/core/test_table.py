"""A notebook shows plans and summaries as the table that the text is: escaped, folded, totals below."""

from __future__ import annotations

import copy
import pickle
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.core.table import Table
from gs_algos.ptq.weights import summary


class Reader(HTMLParser):
    """The cells of a table, row by row, and the tags that open and close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: dict[str, list[list[str]]] = {"caption": [[]], "thead": [], "tbody": [], "tfoot": []}
        self.scopes: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.scopes += [value for key, value in attrs if key == "scope"]
        if tag == "tr":
            self.rows[self.open[1]].append([])
        elif tag in ("td", "th"):
            self.rows[self.open[1]][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[self.open[1]][-1][-1] += data
        elif self.open[-1] == "caption":
            self.rows["caption"][0].append(data)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)))
        self.ends = nn.ModuleDict({"<b>&": nn.Linear(8, 2)})

    def forward(self, x):
        return self.ends["<b>&"](self.blocks(x))


def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "algo", [gs_algos.SimQAT(), gs_algos.SLB(total_steps=2), gs_algos.Prune()], ids=lambda a: a.name
)
def test_a_plan_is_the_same_table_in_html(algo):
    plan = algo.plan(Blocks(), x())
    read, (head, titles, _, *lines) = Reader(plan._repr_html_()), str(plan).splitlines()
    assert read.rows["caption"] == [[head]]
    assert [" ".join(row) for row in read.rows["thead"]] == [" ".join(titles.split())]
    body, foot = read.rows["tbody"], read.rows["tfoot"]
    texts = [" ".join(line.split()) for line in lines]
    assert [" ".join(filter(None, " ".join(row).split())) for row in [*body, *foot]] == texts
    assert [row for row in body if len(row) != len(read.rows["thead"][0])] == []
    assert read.scopes == ["col"] * len(read.rows["thead"][0]) + ["row"] * len(body)


def test_layers_of_many_blocks_are_one_row_and_totals_are_below():
    read = Reader(gs_algos.plan_weights(Blocks(), "int4@channel")._repr_html_())
    assert read.rows["tbody"][0][:2] == ["blocks.0.0 ... blocks.11.0", "12"]
    assert read.rows["tbody"][1][0] == "ends.<b>&"
    assert len(read.rows["tbody"]) == 2 and read.rows["tfoot"][-1][0].startswith("weights: 784 of 882 numbers")


def test_what_a_name_holds_is_no_html():
    assert "ends.&lt;b&gt;&amp;" in gs_algos.plan_weights(Blocks(), "int4@channel")._repr_html_()


def test_summaries_are_text_that_a_notebook_shows_as_a_table():
    algo = gs_algos.SimQAT()
    net = algo.apply(Blocks(), x())
    table = algo.summary(net)
    assert isinstance(table, str) and table.splitlines()[0].split()[:2] == ["layer", "count"]
    assert Reader(table._repr_html_()).rows["thead"][0][:2] == ["layer", "count"]
    packed = summary(gs_algos.quantize_weights(Blocks(), "int4@channel"))
    assert Reader(packed._repr_html_()).rows["tfoot"] == [[packed.splitlines()[-1]]]


def test_the_plans_of_a_pipeline_are_shown_one_below_the_other():
    net = Blocks()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plans = gs_algos.Pipeline([gs_algos.Prune(), gs_algos.SimQAT()]).plan(net, x())
    assert [plan.algorithm for plan in plans] == ["prune", "simqat"]
    assert str(plans).splitlines()[0].startswith("prune: ") and "\n\nsimqat: " in str(plans)
    assert [plans._repr_html_().count(tag) for tag in ("<caption", "</table>")] == [2, 2]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    late = gs_algos.Pipeline([gs_algos.Prune(), gs_algos.SimQAT(rules=[("nowhere", None)])])
    with pytest.raises(ValueError, match=r"^Pipeline.plan: stage 2: .*every rule must match a layer, got nowhere"):
        late.plan(net, x())


def test_a_table_is_copied_and_pickled_with_its_cells():
    table = Table.of(("a", "b"), [(1, "<")], "t", ["z"])
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other == table == "t\na  b\n-  -\n1  <\nz" and other._repr_html_() == table._repr_html_()
    assert Table("a < b")._repr_html_() == "<pre>a &lt; b</pre>"
