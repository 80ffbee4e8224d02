"""What type checkers, editors and `inspect` say of the options is what the configs have."""

from __future__ import annotations

import inspect
import json
import pydoc
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gs_algos import SCOP, SLB, Prune, SimQAT
from gs_algos.pruning.prune import PruneOptions
from gs_algos.pruning.scop import SCOPOptions
from gs_algos.qat.simqat import SimQATOptions
from gs_algos.qat.slb.config import SLBOptions

ROOT = Path(__file__).parent.parent
OPTIONS: dict[Any, Any] = {SimQAT: SimQATOptions, SLB: SLBOptions, Prune: PruneOptions, SCOP: SCOPOptions}
WRONG = """
import gs_algos
from gs_algos import SCOP, SLB, Prune, SimQAT

SimQAT(wieght="int8")
SLB(total_steps="many")
SCOP(rate=0.4, knockofs=1)
Prune(importance="l2", seed="x")
"""
RIGHT = """

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from gs_algos import Algorithm, AlgorithmConfig
from gs_algos import LevelGrid, Pipeline, Plan, PlanRow, Scheme, SimQATConfig, SlbAdamW, Stage, plan_weights
from gs_kernels import IntFormat, PackedWeight, PerGroup, fake_quant, pack_weight, qmatmul

net: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
x = torch.randn(4, 8)
scheme = Scheme(IntFormat(4), PerGroup(4))
algo = SimQAT(weight=scheme, act=None, quant_delay=(1, 2), rules=[("0", None), (nn.Linear, {"act": None})])
SimQAT(SimQATConfig(weight=scheme), process_group=None)
plan: Plan = algo.plan(net, x)
rows: tuple[PlanRow, ...] = plan.acted()
quantized: int = plan.totals.quantized if plan.totals is not None else 0
net = algo.apply(net, {"x": x})
algo.step()
net = algo.convert(net)
text: str = algo.summary(net)
gs_algos.save(net, "checkpoint")
again: nn.Module = gs_algos.load("checkpoint", lambda: nn.Sequential(nn.Linear(8, 8)))
resumed: SimQAT = SimQAT.resume(again)
names = [entry["algorithm"] for entry in gs_algos.history(net)]
slb = SLB(weight=LevelGrid(2, "channel"), total_steps=10, ends="int8@channel", fused=True)
optimizer = SlbAdamW(slb.fused_layers(), lr=0.1)
scop = SCOP(rate=0.4, knockoffs="permute", select_steps=10)
betas: tuple[float, float] = scop.config.betas


def train(net: nn.Module, stage: Stage) -> None:
    stage.algorithm.step()


net = Pipeline([scop, SimQAT()], folder="out").run(net, x, train)
net = gs_algos.quantize_weights(net, scheme, rules=[("0", scheme), ("1", None)])
print(plan_weights(net, "int4@channel").totals)
gs_algos.export_onnx(net, x, "net.onnx", signed_weights=True)
gs_algos.quantize_checkpoint("folder", "packed", scheme, embeddings=scheme)
w: PackedWeight = pack_weight(torch.zeros(4, 8), torch.ones(4, 1), 0, bits=8, group_size=8)
y: Tensor = qmatmul(x, w)
z: Tensor = fake_quant(x, torch.ones(4), torch.zeros(4), qmin=-8, qmax=7)


@dataclass(frozen=True)
class OwnConfig(AlgorithmConfig):
    keep: int = 2


class Own(Algorithm):
    config: OwnConfig
"""


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda algorithm: algorithm.__name__)
def test_the_options_that_checkers_know_are_the_fields_of_the_config(algorithm):
    named = {field.name for field in fields(algorithm.config_class)}
    assert set(OPTIONS[algorithm].__annotations__) | set(own(algorithm)) == named


def own(algorithm: Any) -> list[str]:
    """Options that have a parameter of their own."""
    return [name for name in inspect.signature(algorithm.__init__).parameters if name == "knockoffs"]


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda algorithm: algorithm.__name__)
def test_the_signature_names_every_option_with_its_default(algorithm):
    parameters = inspect.signature(algorithm).parameters
    for field in fields(algorithm.config_class):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field.name].default == field.default or field.name == "knockoffs"
    assert next(iter(parameters)) == "config" and "process_group" in parameters


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda algorithm: algorithm.__name__)
def test_a_misspelt_option_is_answered(algorithm):
    with pytest.raises(
        TypeError, match=rf"{algorithm.config_class.who}: options are .*, got rulez; did you mean rules"
    ):
        algorithm(rulez=[])


def test_mypy_sees_the_options_in_a_users_script(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(WRONG + RIGHT)
    # torch is left out: it takes mypy 10 s, and none of the options is of a type of its own
    words = ["--follow-imports=silent", "--no-site-packages", "--ignore-missing-imports", "--config-file=", "--strict"]
    command = [sys.executable, "-m", "mypy", *words, "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line.partition("user.py:")[2] for line in done.stdout.splitlines() if ": error:" in line]
    assert [error.partition(":")[0] for error in errors] == ["5", "6", "7", "8"], done.stdout + done.stderr
    assert 'did you mean "weight"?' in errors[0] and '"int | None"' in errors[1]


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_sees_the_options_in_a_users_script(tmp_path):
    (tmp_path / "user.py").write_text(WRONG + RIGHT)
    settings = {"include": ["user.py"], "typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--outputjson", "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [about["range"]["start"]["line"] for about in found] == [4, 5, 6, 7], found
    assert 'No parameter named "wieght"' in found[0]["message"] and '"int | None"' in found[1]["message"]


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda algorithm: algorithm.__name__)
def test_help_shows_the_options(algorithm):
    first = pydoc.plain(pydoc.render_doc(algorithm)).splitlines()[3]
    assert all(f" {field.name}: " in first for field in fields(algorithm.config_class)), first


def test_an_editable_install_is_a_path_that_checkers_follow():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}  # else setuptools makes an import hook, which they do not run
