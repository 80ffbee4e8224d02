"""Stacks of algorithms: run in order, stopped anywhere and continued bit for bit, described by a file."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SCOP, SLB, Prune, SimQAT
from gs_algos.cli import compress
from gs_algos.cli.app import run as command
from gs_algos.core.algorithm import history
from gs_algos.pipeline.pipeline import Pipeline, Stage
from gs_algos.pipeline.recipe import Recipe, StageRecipe, make_algorithm, read_recipe
from tests.nets.convolutional import SmallConvNet, images


class Stopped(Exception):
    pass


def small() -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet()


class Trainer:
    """Four steps of plain SGD a stage. Saves before each step; stops before step `stop` (stage, step) of its life."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.stop = stop
        self.seen: list[tuple[str, int, bool]] = []

    def __call__(self, net: nn.Module, stage: Stage) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        self.seen.append((stage.name, stage.algorithm.steps, stage.resumed))
        net.train()
        loss_fn = stage.algorithm.loss(F.cross_entropy)
        while stage.algorithm.steps < 4:
            if stage.folder is not None:
                stage.save(net)
            if self.stop == (stage.number, stage.algorithm.steps):
                raise Stopped
            optimizer.zero_grad()
            loss_fn(net(images(seed=stage.algorithm.steps)), torch.arange(8) % 4).backward()
            optimizer.step()
            stage.algorithm.step()


def algorithms() -> list[gs_algos.Algorithm]:
    return [SCOP(rate=0.5, select_steps=2, knockoffs=[images(seed=50), images(seed=51)]), SimQAT()]


def evaluated(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(images())


@pytest.fixture(scope="module")
def whole() -> Tensor:
    """The outputs of a run that nothing stopped."""
    return evaluated(Pipeline(algorithms()).run(small(), images(), Trainer()))


@pytest.mark.parametrize("stop", [(1, 0), (1, 3), (2, 0), (2, 1)])
def test_a_stopped_pipeline_continues_as_if_nothing_had_been(stop, whole, tmp_path):
    with pytest.raises(Stopped):
        Pipeline(algorithms(), tmp_path).run(small(), images(), Trainer(stop))
    trainer = Trainer()
    net = Pipeline(algorithms(), tmp_path).resume(SmallConvNet, images(), trainer)
    assert torch.equal(evaluated(net), whole)
    name = f"{stop[0]}-{'scop' if stop[0] == 1 else 'simqat'}"
    assert trainer.seen[0] == (name, stop[1], True)
    again = gs_algos.load(tmp_path / "2-simqat", SmallConvNet)
    assert torch.equal(evaluated(again), whole)
    assert [e["algorithm"] for e in history(again)] == ["scop", "simqat"]


def test_a_pipeline_stopped_between_stages_or_at_its_end_continues(whole, tmp_path):
    def stop(net: nn.Module, stage: Stage) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        Pipeline(algorithms(), tmp_path).run(small(), images(), Trainer(), stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-scop", "pipeline.json", "start.safetensors"]
    trainer = Trainer()
    Pipeline(algorithms(), tmp_path).resume(SmallConvNet, images(), trainer)
    assert trainer.seen == [("2-simqat", 0, False)]
    done = Pipeline(algorithms(), tmp_path).resume(SmallConvNet, images(), stop)
    assert torch.equal(evaluated(done), whole)


def test_a_pipeline_stopped_before_its_first_stage_starts_from_the_same_weights(whole, tmp_path):
    pipeline = Pipeline(algorithms(), tmp_path)
    with pytest.raises(Stopped):
        pipeline.run(small(), images(), Trainer((1, 0)))
    pipeline._write(done=0, began=False)
    net = Pipeline(algorithms(), tmp_path).resume(SmallConvNet, images(), Trainer())
    assert torch.equal(evaluated(net), whole)


def test_any_algorithm_may_follow_any_other(tmp_path):
    def train(net: nn.Module, stage: Stage) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for i in range(stage.algorithm.config.select_steps if stage.number == 1 else 2):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(images(seed=i)), torch.arange(8) % 4).backward()
            optimizer.step()
            stage.algorithm.step()

    first = Prune(rate=0.25, importance="taylor", select_steps=1)
    stack = [first, Prune(rate=0.3), SLB(weight="2bit@channel", **SLB.training_options(1, 2))]
    net = Pipeline(stack, tmp_path).run(small(), images(), train)
    again = gs_algos.load(tmp_path / "3-slb", SmallConvNet)
    assert torch.equal(evaluated(again), evaluated(net))
    assert [e["algorithm"] for e in history(again)] == ["prune", "prune", "slb"]


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one algorithm must be given"):
        Pipeline([])
    with pytest.raises(TypeError, match=r"must be an algorithm such as SimQAT\(\), got <class"):
        Pipeline([SimQAT])
    algo = SimQAT()
    with pytest.raises(ValueError, match="an object of its own"):
        Pipeline([algo, algo])
    with pytest.raises(ValueError, match="must have a folder, got folder=None"):
        Pipeline([algo]).resume(SmallConvNet, images(), Trainer())
    with pytest.raises(ValueError, match=r"pipeline.json must be a pipeline's JSON"):
        Pipeline([algo], tmp_path).resume(SmallConvNet, images(), Trainer())
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="the folder must be new, empty or a pipeline's"):
        Pipeline([algo], tmp_path).run(small(), images(), Trainer())
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_another_stack_is_not_resumed(tmp_path):
    with pytest.raises(Stopped):
        Pipeline([SimQAT()], tmp_path).run(small(), images(), Trainer((1, 1)))
    for other, words in (
        ([SimQAT(weight="int4@channel")], "stage 1 simqat with weight='int4@channel'"),
        ([Prune()], "prune as stage 1"),
        ([SimQAT(), Prune()], "2 of them, it has 1"),
    ):
        with pytest.raises(ValueError, match=f"must be those of the run in .* got {words}"):
            Pipeline(other, tmp_path).resume(SmallConvNet, images(), Trainer())
    (tmp_path / "pipeline.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="must be of format 'golden-stick-pipeline'"):
        Pipeline([SimQAT()], tmp_path).resume(SmallConvNet, images(), Trainer())


TOML = """
model = "lenet5"
data = "digits"
float_epochs = 1

[[stage]]
algorithm = "scop"
epochs = 2
select_epochs = 1
options = { rate = 0.25, rules = [["features.0", "none"]] }

[[stage]]
algorithm = "simqat"
epochs = 1
lr = 1
options = { act = "none" }
"""
YAML = """
model: lenet5
data: digits
float_epochs: 1
stage:
- {algorithm: scop, epochs: 2, select_epochs: 1, options: {rate: 0.25, rules: [[features.0, none]]}}
- {algorithm: simqat, epochs: 1, lr: 1, options: {act: none}}
"""
STAGES = (
    StageRecipe("scop", 2, {"rate": 0.25, "rules": [["features.0", "none"]]}, select_epochs=1),
    StageRecipe("simqat", 1, {"act": "none"}, lr=1),
)


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_toml_yaml_and_json_say_the_same(tmp_path):
    want = Recipe("lenet5", "digits", STAGES, float_epochs=1)
    assert read_recipe(written(tmp_path, TOML)) == want
    assert read_recipe(written(tmp_path, YAML, "run.yaml")) == want
    stages = [{k: v for k, v in stage.__dict__.items() if v is not None} for stage in STAGES]
    text = json.dumps({"model": "lenet5", "data": "digits", "float_epochs": 1, "stage": stages})
    assert read_recipe(written(tmp_path, text, "run.json")) == want
    scop, simqat = (make_algorithm(stage, 40) for stage in want.stage)
    assert (scop.config.select_steps, scop.config.rules, simqat.config.act) == (40, (("features.0", None),), None)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("float_epochs", "flaot_epochs", "got flaot_epochs; did you mean float_epochs"),
        ("epochs = 2", "epoch = 2", "stage 1 has algorithm, .* got epoch; did you mean epochs"),
        ('data = "digits"\n', "", "must have data, got model, float_epochs, stage"),
        ("float_epochs = 1", 'float_epochs = "1"', "float_epochs must be int, got '1'"),
        ("float_epochs = 1", "float_epochs = true", "float_epochs must be int, got True"),
        ("lr = 1", "lr = []", "stage 2: lr must be float, got"),
        ("select_epochs = 1", "select_epochs = 3", r"select_epochs must be in 1..epochs, got 3 of 2"),
        ("rate = 0.25", "rates = 0.25", "stage 1: SCOP: options are .* got rates; did you mean rate"),
        ("rate = 0.25", "rate = 1.5", r"stage 1: SCOP: rate must be in \[0, 1\), got 1.5"),
        ('algorithm = "scop"', 'algorithm = "scoop"', "got 'scoop'; did you mean scop"),
        ("[[stage]]", "[stage]", "must be a readable .toml file"),
        ("model =", "model", "must be a readable .toml file"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(old, new, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_recipe(written(tmp_path, TOML.replace(old, new)))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("run.ini", "", "a name that ends in .ini; use .toml, .yaml or .json"),
        ("run.json", "[1]", "must be a table of keys and values, got list"),
        ("run.json", '{"model": "a", "data": "b", "stage": []}', r"stage must be at least one table, got none"),
        ("run.json", '{"model": "a", "data": "b", "stage": 3}', r"stage must be a list of tables, got 3"),
        ("run.yaml", "a: [", "must be a readable .yaml file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(name, text, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read_recipe(written(tmp_path, text, name))


def test_an_interrupted_command_continues_bit_for_bit(tmp_path, monkeypatch):
    recipe = written(tmp_path, TOML.replace("rate = 0.25", 'rate = 0.25, knockoffs = "generator"'))
    stop, fit = {"at": 0}, SCOP.fit_knockoffs
    monkeypatch.setattr(SCOP, "fit_knockoffs", lambda algo, batches: fit(algo, batches, steps=10))  # seven times

    @contextmanager
    def bar(what: str):
        def on_step(done: int, total: int, loss: Tensor) -> None:
            if what.startswith("1-scop") and done == stop["at"]:
                signal.raise_signal(signal.SIGINT)

        yield on_step

    def final(out: Path, *more: str) -> dict[str, Tensor]:
        assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu", *more]) == 0
        return load_file(next((out / "stages" / "2-simqat").glob("*.safetensors")))

    monkeypatch.setattr(compress, "bar", bar)
    want = final(tmp_path / "whole")
    for at in (9, 22, 30):  # while beta trains, when the cut is decided, after it
        stop["at"] = at
        out = tmp_path / str(at)
        assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu"]) == 130
        stop["at"] = 0
        got = final(out, "--resume")
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_the_command_runs_a_recipe_and_says_what_it_gave(tmp_path, capsys):
    recipe = written(tmp_path, TOML)
    out = tmp_path / "out"
    assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("float", "1-scop", "2-simqat", "saved, and equal when loaded"))
    assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu", "--resume"]) == 0
    assert command(["info", str(out / "stages" / "2-simqat")]) == 0
    assert "1. scop, converted after 44 steps" in capsys.readouterr().out
    other = written(tmp_path, TOML.replace("0.25", "0.5"))
    assert command(["compress", "--recipe", str(other), "--out", str(out), "--resume"]) == 2
    assert "needs the recipe of the run in" in capsys.readouterr().err
    assert command(["compress", "--recipe", str(written(tmp_path, TOML.replace("epochs = 2", "epoch = 2")))]) == 2
    assert "did you mean epochs" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").touch()
    assert command(["compress", "--recipe", str(recipe), "--out", str(tmp_path / "foreign")]) == 2
