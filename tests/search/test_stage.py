"""A search as an algorithm: in a loop, in a pipeline, in a recipe; what it leaves is the inner one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gs_algos
from gs_algos import PTQ, Pipeline, SimQAT
from gs_algos.pipeline.recipe import make_algorithm, read_recipe
from gs_algos.search.presets import AMC, HAQ, NAS
from gs_algos.search.stage import Search
from tests.helpers import Untouched
from tests.search.nets import data, images, net

RECIPE = 'model = "lenet5"\ndata = "digits"\n[[stage]]\nalgorithm = "simqat"\nepochs = 1\n'
OPTIONS = {"budget": "16% bytes", "evaluations": 3}


def searched() -> Search:
    return Search(SimQAT(act=None), data=data(), **OPTIONS)


def same_state(a, b) -> bool:
    theirs = b.state_dict()
    return list(a.state_dict()) == list(theirs) and all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


def test_the_network_is_that_of_the_inner_algorithm_with_the_rules_found():
    algo = searched()
    model = algo.convert(algo.apply(net(), images()))
    assert algo.policy is not None
    other = SimQAT(act=None, rules=algo.policy.rules[0])
    assert same_state(model, other.convert(other.apply(net(), images())))
    assert gs_algos.history(model)[-1]["algorithm"] == "simqat"


def test_rules_of_the_user_stay():
    algo = Search(SimQAT(act=None, rules=[("3", {"weight": "int3@channel"})]), data=data(), **OPTIONS)
    algo.apply(net(), images())
    assert algo.inner.config.rules[0] == ("3", {"weight": "int3@channel"})
    assert "3" not in algo.policy.rules[0][0][0]


def test_what_only_the_inner_algorithm_has_is_there():
    algo = Search(PTQ(weight="int4@channel"), data=data(), **OPTIONS)
    model = algo.apply(net(), images())
    assert not algo.trains
    algo.calibrate(model, data())
    assert algo.report is not None and algo.convert(model) is model


def test_without_data_nothing_is_applied():
    model = net()
    before = Untouched(model)
    with pytest.raises(
        ValueError, match=r"Search.apply: data must be batches of training inputs, got none; set Search"
    ):
        Search(SimQAT()).apply(model, images())
    assert before


def test_the_plan_says_that_there_will_be_a_search():
    assert "searched by ilp, for 16% bytes" in str(searched().plan(net(), images()))


@pytest.mark.parametrize("preset", [HAQ, AMC, NAS])
def test_presets_are_algorithms(preset):
    algo = preset(data=data(), evaluations=2, **({"budget": "5% bops"} if preset is HAQ else {"budget": "70% macs"}))
    model = algo.apply(net(), images())
    before = sum(p.numel() for p in net().parameters())
    assert gs_algos.history(model)[-1]["algorithm"] == algo.inner.name
    if preset is not HAQ:
        assert sum(p.numel() for p in algo.convert(model).parameters()) < before


def test_a_saved_network_loads_without_the_code_of_searches(tmp_path):
    algo = searched()
    model = algo.convert(algo.apply(net(), images()))
    gs_algos.save(model, tmp_path / "saved")
    torch.save(model(images()), tmp_path / "y.pt")
    code = f"""
import sys, torch, gs_algos
sys.modules["gs_algos.search"] = None
from tests.search.nets_alone import net
model = gs_algos.load({str(tmp_path / "saved")!r}, net)
from tests.search.nets_alone import images
assert torch.equal(model(images()), torch.load({str(tmp_path / "y.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr


def test_a_pipeline_that_was_stopped_goes_on_with_the_rules_found(tmp_path):
    def stopped(model, stage):
        stage.save(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline([searched()], tmp_path).run(net(), images(), stopped)
    stages = []
    resumed = Pipeline([searched()], tmp_path).resume(net, images(), lambda model, stage: stages.append(stage))
    whole = Pipeline([searched()]).run(net(), images(), lambda model, stage: None)
    assert same_state(resumed, whole)
    assert stages[0].name == "1-simqat" and (tmp_path / "1-simqat").is_dir()


def test_a_pipeline_of_another_search_is_refused(tmp_path):
    Pipeline([searched()], tmp_path).run(net(), images(), lambda model, stage: None)
    for other in (Search(SimQAT(act=None), budget="20% bytes"), Search(SimQAT(), **OPTIONS), SimQAT(act=None)):
        with pytest.raises(ValueError, match="the stages must be those of the run"):
            Pipeline([other], tmp_path).resume(net, images(), lambda model, stage: None)


def test_the_rules_pasted_into_a_recipe_give_the_same_network(tmp_path):
    algo = searched()
    model = algo.convert(algo.apply(net(), images()))
    assert algo.policy is not None
    (line,) = algo.policy.recipe_lines()
    recipe = RECIPE
    (tmp_path / "run.toml").write_text(recipe + line.replace("{ rules", "{ act = 'none', rules"))
    pasted = make_algorithm(read_recipe(tmp_path / "run.toml").stage[0], 1)
    assert same_state(model, pasted.convert(pasted.apply(net(), images()), images()))


def test_a_recipe_may_hold_a_search(tmp_path):
    text = RECIPE + '[stage.search]\nbudget = "3 bits"\n'
    (tmp_path / "run.toml").write_text(text)
    algo = make_algorithm(read_recipe(tmp_path / "run.toml").stage[0], 1)
    assert isinstance(algo, Search) and algo.config.budget == "3 bits" and isinstance(algo.inner, SimQAT)


@pytest.mark.parametrize(
    "line, words",
    [
        ('budget = "3 bit"', "budget must be like '40% bytes'"),
        ('agent = "ipl"', "agent must be one of .*, got 'ipl'; did you mean ilp"),
        ("evaluation = 3", "options are .*, got evaluation; did you mean evaluations"),
        ("evaluations = 0", "evaluations must be a whole number >= 1, got 0"),
    ],
)
def test_a_wrong_search_in_a_recipe_is_found_before_anything_is_trained(tmp_path, line, words):
    text = RECIPE + "[stage.search]\n"
    (tmp_path / "run.toml").write_text(text + line)
    with pytest.raises(ValueError, match=words):
        read_recipe(tmp_path / "run.toml")
