"""Algorithms of other packages: found by entry point, imported when they are asked for, refused in one line."""

from __future__ import annotations

import inspect
import logging
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SimQAT
from gs_algos.core import registry
from gs_algos.core.registry import algorithm_class, algorithm_names

HALVES = '''
from typing import Any, ClassVar
from dataclasses import dataclass
import gs_algos

print("acme_halves is imported")


@dataclass(frozen=True)
class Halved(gs_algos.RowSettings):
    form: ClassVar[str] = "halved"
    factor: float


@dataclass(frozen=True)
class HalvesConfig(gs_algos.AlgorithmConfig):
    factor: float = 0.5
    who: ClassVar[str] = "Halves"


class Halves(gs_algos.Algorithm):
    """Multiplies every weight by a factor after each step."""

    row_settings = (Halved,)

    name: ClassVar[str] = "halves"
    config: HalvesConfig

    def __init__(self, config=None, **options):
        self.config, self.steps = HalvesConfig.choose(config, options), 0

    def plan(self, model, example_inputs):
        return gs_algos.Plan(self.name, "", tuple(self._rows(model)))

    def _rows(self, model):
        for name, parameter in model.named_parameters():
            yield gs_algos.PlanRow(name, type(parameter).__name__, "halve", settings=Halved(self.config.factor))

    def apply(self, model, example_inputs):
        self.model, self.entry = model, self.remember(model, "prepared", self._rows(model))
        return model

    def step(self):
        self.steps += 1
        self.entry["steps"] = self.steps
        for parameter in self.model.parameters():
            parameter.data *= self.config.factor

    def convert(self, model, example_inputs=None):
        self.remember(model, "converted", self._rows(model), self.steps, doubled=[1, 2])
        return model

    def summary(self, model):
        return "halved"

    @classmethod
    def resume(cls, model):
        entry = gs_algos.history(model)[-1]
        algo = cls(HalvesConfig.from_dict(entry["config"]))
        algo.model, algo.steps = model, entry["steps"]
        return algo

    @classmethod
    def restore(cls, model, entry):
        return model
'''
OTHERS = {
    "needs.py": "import there_is_no_such_module\n",
    "raises.py": "raise RuntimeError('two\\nlines')\n",
    "typo.py": "def broken(:\n",
    "none.py": "class Halves:\n    name = 'none'\nvalue = 3\n",
    "renamed.py": HALVES.replace('"halves"', '"thirds"'),
    "abstract.py": "import gs_algos\nclass Part(gs_algos.Algorithm):\n    name = 'abstract'\n    def step(self): ...\n",
}
ENTRIES = """
[gs_algos.algorithms]
halves = acme_halves.acme:Halves
needs = acme_halves.needs:Halves
raises = acme_halves.raises:Halves
typo = acme_halves.typo:Halves
missing = acme_halves.none:Nothing
none = acme_halves.none:Halves
number = acme_halves.none:value
renamed = acme_halves.renamed:Halves
abstract = acme_halves.abstract:Part
simqat = acme_halves.acme:Halves
quantize_weights = acme_halves.acme:Halves
../up = acme_halves.acme:Halves
"""
WRONG = {
    "needs": "'needs' of the package acme-halves 1.2 must be importable as acme_halves.needs:Halves, got "
    "ModuleNotFoundError: No module named 'there_is_no_such_module'; mend or uninstall that package",
    "raises": "importable as acme_halves.raises:Halves, got RuntimeError: two lines; mend",
    "typo": "importable as acme_halves.typo:Halves, got SyntaxError: ",
    "missing": "importable as acme_halves.none:Nothing, got AttributeError: .* 'Nothing'; mend",
    "none": "acme_halves.none:Halves, must be a class that derives from gs_algos.Algorithm, got <class",
    "number": "must be a class that derives from gs_algos.Algorithm, got 3",
    "renamed": "must be a class whose name is 'renamed', got name='thirds'",
    "abstract": "must be a class with every method of gs_algos.Algorithm, got Part without apply, convert, plan",
}


def install(folder: Path, name: str, entries: str, files: dict[str, str]) -> None:
    """A small distribution as pip leaves it: a package and its dist-info."""
    package = folder / name.replace("-", "_")
    package.mkdir(parents=True)
    for file, text in {"__init__.py": "", **files}.items():
        (package / file).write_text(text)
    facts = folder / f"{package.name}-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(textwrap.dedent(entries))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path in which acme-halves is installed."""
    install(tmp_path / "site", "acme-halves", ENTRIES, {"acme.py": HALVES, **OTHERS})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(registry, "_warned", set())
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("acme_halves", "acme_more")]:
        del sys.modules[name]


def named(name: Any) -> Any:
    """The class of HALVES, made in no module of its own, under a name."""
    made: dict[str, Any] = {"__name__": "mine"}
    text = HALVES.replace('print("acme_halves is imported")', "").replace('"halves"', repr(name))
    exec(compile(text, "mine.py", "exec", dont_inherit=True), made)
    return made["Halves"]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2))


def test_an_algorithm_of_another_package_is_found_by_name(site, tmp_path):
    halves = algorithm_class("halves")
    net, x = build(), torch.ones(1, 4)
    before = net[0].weight.detach().clone()
    algo = halves(factor=0.25)
    assert "halve" in str(algo.plan(net, x))
    net = algo.apply(net, x)
    algo.step()
    gs_algos.save(net, tmp_path / "prepared")
    resumed = halves.resume(gs_algos.load(tmp_path / "prepared", build))
    assert resumed.steps == 1 and resumed.config.factor == 0.25
    gs_algos.save(algo.convert(net), tmp_path / "done")
    loaded = gs_algos.load(tmp_path / "done", build)
    assert torch.equal(loaded[0].weight, before * 0.25)
    (entry,) = gs_algos.history(loaded)
    assert entry["algorithm"] == "halves" and entry["stage"] == "converted" and entry["doubled"] == [1, 2]


def test_nothing_of_it_is_imported_before_it_is_asked_for(site):
    assert "halves" in algorithm_names() and algorithm_class("simqat") is SimQAT
    assert not any(name.startswith("acme_halves") for name in sys.modules)
    assert algorithm_class("halves").__module__ in sys.modules


@pytest.mark.parametrize("name, words", WRONG.items())
def test_a_plug_in_that_is_wrong_is_one_line_and_the_others_work(site, name, words):
    with pytest.raises(ValueError, match=f"^algorithm: .*{words}") as told:
        algorithm_class(name)
    assert "\n" not in str(told.value)
    assert algorithm_class("halves").name == "halves" and algorithm_class("simqat") is SimQAT


def test_a_name_that_is_taken_is_told_once_and_stays_ours(site, caplog):
    with caplog.at_level(logging.WARNING, "gs_algos"):
        names = algorithm_names()
        assert algorithm_names() == names and algorithm_class("simqat") is SimQAT
    assert names[: len(registry.ALGORITHMS)] == tuple(registry.ALGORITHMS) and names.count("simqat") == 1
    assert {"prune", "ptq", "scop", "simqat", "slb"} < set(names)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert "algorithm: a package's name for one must be free, got 'simqat' is one of golden-stick's own" in told[0]
    assert all("acme-halves 1.2" in line and "\n" not in line for line in told)
    assert not {"quantize_weights", "../up"} & set(names)


def test_two_packages_of_one_name_are_both_named(site):
    install(site, "acme-more", "[gs_algos.algorithms]\nhalves = acme_more:Halves\nmore = acme_more:X", {})
    with pytest.raises(ValueError, match=r"'halves' must be of one package, got acme-halves 1.2 and acme-more 1.2; un"):
        algorithm_class("halves")
    assert "more" in algorithm_names()


def test_an_unknown_name_is_told_the_names_of_packages_too(site):
    with pytest.raises(
        ValueError, match=r"one of .*prune, ptq, scop, search, simqat, slb, .*halves.*, got 'halvse'; did you mean halv"
    ):
        algorithm_class("halvse")


def test_a_checkpoint_of_a_package_that_is_gone_says_what_is_missing(site, tmp_path, monkeypatch):
    algo = algorithm_class("halves")()
    gs_algos.save(algo.apply(build(), torch.ones(1, 4)), tmp_path / "net")
    (site / "acme_halves" / "acme.py").write_text("import there_is_no_such_module")
    for name in ("acme_halves.acme", "acme_halves"):
        del sys.modules[name]
    with pytest.raises(ValueError, match=r"^load: .* cannot be read, algorithm: 'halves' of the package acme-halves"):
        gs_algos.load(tmp_path / "net", build)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(site)])
    with pytest.raises(
        ValueError, match=r"^load: .* unknown algorithm: .* got 'halves'; update .*, or install or import"
    ):
        gs_algos.load(tmp_path / "net", build)


def test_recipes_pipelines_and_the_command_take_it(site, tmp_path, capsys):
    from gs_algos.cli.demo import make_algorithm
    from gs_algos.pipeline.recipe import StageRecipe, read_recipe
    from gs_algos.pipeline.recipe import make_algorithm as of_recipe

    recipe = 'model = "m"\ndata = "d"\n[[stage]]\nalgorithm = "halves"\nepochs = 1\noptions = { factor = 0.25 }\n'
    (tmp_path / "r.toml").write_text(recipe)
    (stage,) = read_recipe(tmp_path / "r.toml").stage
    algo = of_recipe(stage, 1)
    net, x = build(), torch.ones(1, 4)
    pipeline = gs_algos.Pipeline([algo, of_recipe(StageRecipe("simqat", 1), 1)], tmp_path / "out")
    pipeline.run(net, x, lambda net, stage: stage.algorithm.step())
    again = gs_algos.load(tmp_path / "out" / "2-simqat", build)
    assert [entry["algorithm"] for entry in gs_algos.history(again)] == ["halves", "simqat"]
    assert type(make_algorithm("halves", "", "")).__name__ == "Halves"
    with pytest.raises(ValueError, match="halves: --weight is no option of Halves"):
        make_algorithm("halves", "int8@channel", "")


def test_a_class_is_registered_by_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    mine = gs_algos.register_algorithm(named("halves"))
    assert algorithm_class("halves") is mine and "halves" in algorithm_names()
    assert gs_algos.register_algorithm(mine) is mine  # a notebook's cell runs twice


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: named("simqat"), "name must be free, got 'simqat', which is golden-stick's"),
        (lambda: named("a/b"), "name must be letters, digits, - and _, got 'a/b'"),
        (lambda: named(3), "a class with a name, got Halves without; write name = 'halves'"),
        (lambda: "Halves", "a class that derives from gs_algos.Algorithm, got 'Halves'"),
        (lambda: type("Halves", (gs_algos.Algorithm,), {"name": "halves"}), "every method of gs_algos.Algorithm, got"),
        (lambda: type("SimQAT", (SimQAT,), {}), "name must be free, got 'simqat'"),
    ],
)
def test_what_cannot_be_registered_is_told_why(make, words, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises((ValueError, TypeError), match=f"register_algorithm: .*{words}"):
        gs_algos.register_algorithm(make())


def test_another_class_of_a_registered_name_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    gs_algos.register_algorithm(named("halves"))
    other = named("halves")
    other.__module__ = "theirs"
    with pytest.raises(ValueError, match=r"name must be free, got 'halves', which is that of mine.Halves"):
        gs_algos.register_algorithm(other)


def test_a_loop_for_any_algorithm_sees_which_ones_calibrate(site):
    algorithms = {name: algorithm_class(name)() for name in ("simqat", "slb", "prune", "scop", "halves")}
    assert [name for name, algo in algorithms.items() if isinstance(algo, gs_algos.Calibrates)] == ["simqat", "slb"]
    ways = {inspect.signature(cls.calibrate) for cls in (gs_algos.Calibrates, SimQAT, gs_algos.SLB)}
    assert len(ways) == 1
