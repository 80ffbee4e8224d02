"""A search inside of Distill: rules are found before a teacher trains the network, in loops, pipelines and recipes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gs_algos
from gs_algos import PTQ, Distill, Pipeline, Prune, SimQAT
from gs_algos.cli.app import run as command
from gs_algos.demo.models import build
from gs_algos.pipeline.pipeline import Stage
from gs_algos.search.presets import AMC
from gs_algos.search.stage import Search
from tests.search.nets import data, images, net

BYTES = {"budget": "16% bytes", "evaluations": 2}
RECIPE = """
model = "lenet5"
data = "digits"
float_epochs = 0

[[stage]]
algorithm = "simqat"
epochs = 1
options = { weight = "int4@channel" }

[stage.search]
budget = "3 bits"
evaluations = 2

[stage.distill]
temperature = 2.0
"""


def taught() -> Distill:
    return Distill(Search(SimQAT(act=None), data=data(), **BYTES), features=0.5, pairs=["4"])


def train(model: nn.Module, algo: Distill, steps: int = 2) -> None:
    loss_fn = algo.loss(F.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss_fn(model.train()(images(8)), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    model.eval()


def test_the_teacher_is_the_network_before_the_search_and_the_rules_are_trained():
    model, want = net(), net()(images())
    algo = taught()
    model = algo.apply(model, images())
    assert torch.equal(algo.teacher(images()), want)
    assert len({rule[1]["weight"] for rule in algo.policy.rules[0]}) > 1  # what only a search has is there too
    other = Distill(SimQAT(act=None, rules=algo.policy.rules[0]), features=0.5, pairs=["4"])
    plain = other.apply(net(), images())
    for one, by in ((model, algo), (plain, other)):
        train(one, by)
    got, want = (by.convert(one)(images()) for one, by in ((model, algo), (plain, other)))
    assert torch.equal(got, want)


def test_what_is_saved_is_of_the_algorithm_that_was_searched_for(tmp_path):
    algo = taught()
    model = algo.apply(net(), images())
    train(model, algo)
    gs_algos.save(model, tmp_path / "prepared")
    loaded = gs_algos.load(tmp_path / "prepared", net)
    again = Distill.resume(loaded)
    assert type(again.inner) is SimQAT and again.steps == 2
    again.teacher = net()
    train(loaded, again)
    train(model, algo)
    assert torch.equal(again.convert(loaded, images())(images()), algo.convert(model)(images()))


@pytest.mark.parametrize("stopped_in", [1, 2])
def test_a_pipeline_that_was_stopped_goes_on_with_teacher_and_rules(tmp_path, stopped_in):
    def stages() -> list:
        return [Distill(AMC(Prune(), data=data(), evaluations=2, budget="70% macs")), taught()]

    def trained(model: nn.Module, stage: Stage) -> None:
        assert isinstance(stage.algorithm, Distill)
        train(model, stage.algorithm, 2 - stage.algorithm.steps)

    def stops(model: nn.Module, stage: Stage) -> None:
        if stage.number == stopped_in:
            train(model, stage.algorithm, 1)
            stage.save(model)
            raise KeyboardInterrupt
        trained(model, stage)

    with pytest.raises(KeyboardInterrupt):
        Pipeline(stages(), tmp_path).run(net(), images(), stops)
    resumed = Pipeline(stages(), tmp_path).resume(net, images(), trained)
    whole = Pipeline(stages()).run(net(), images(), trained)
    assert torch.equal(resumed(images()), whole(images()))
    assert [entry["algorithm"] for entry in gs_algos.history(resumed)] == ["prune", "simqat"]


def test_a_recipe_may_search_and_distill_a_stage(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    files = "--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")
    assert command(["compress", *files, "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "search-1.jsonl").is_file()
    lenet = partial(build, "lenet5", in_channels=1, num_classes=10, image_size=8)
    saved = gs_algos.load(tmp_path / "out" / "stages" / "1-simqat", lenet)
    assert [entry["algorithm"] for entry in gs_algos.history(saved)] == ["simqat"]
    assert gs_algos.history(saved)[0]["config"]["rules"]


def test_a_wrong_nesting_says_the_right_one():
    with pytest.raises(
        TypeError, match=r"got Distill\(SimQAT\); distill outside, .* Distill\(Search\(SimQAT\(\), data="
    ):
        Search(Distill(SimQAT()), data=data())
    with pytest.raises(TypeError, match="inner must be an algorithm that trains, got PTQ"):
        Distill(Search(PTQ(weight="int4@channel"), data=data()))


def test_a_search_that_fails_leaves_the_network_and_no_teacher():
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    algo = Distill(Search(SimQAT(act=None)))
    with pytest.raises(ValueError, match=r"Search.apply: data must be batches of training inputs, got none"):
        algo.apply(model, images())
    assert algo.teacher is None and not gs_algos.history(model)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
