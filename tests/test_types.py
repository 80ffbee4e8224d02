"""What type checkers, editors and `inspect` say of the options is what the configs have."""

from __future__ import annotations

import inspect
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
from gs_algos.qat.slb_config import SLBOptions

ROOT = Path(__file__).parent.parent
OPTIONS: dict[Any, Any] = {SimQAT: SimQATOptions, SLB: SLBOptions, Prune: PruneOptions, SCOP: SCOPOptions}
SCRIPT = """
from torch import nn
from gs_algos import SCOP, SLB, Prune, SimQAT

SimQAT(wieght="int8")
SLB(total_steps="many")
SCOP(rate=0.4, knockofs=1)
Prune(importance="l2", seed="x")
SimQAT(weight="int4@channel", act=None, quant_delay=(1, 2), rules=[("fc", None), (nn.Linear, {"act": None})])
SCOP(knockoffs="permute", rate=0.4).config.betas
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
    (tmp_path / "user.py").write_text(SCRIPT)
    # torch is left out: it takes mypy 10 s, and none of the options is of a type of its own
    words = ["--follow-imports=silent", "--no-site-packages", "--ignore-missing-imports", "--config-file="]
    command = [sys.executable, "-m", "mypy", *words, "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line.partition("user.py:")[2] for line in done.stdout.splitlines() if ": error:" in line]
    assert [error.partition(":")[0] for error in errors] == ["5", "6", "7", "8"], done.stdout + done.stderr
    assert 'did you mean "weight"?' in errors[0] and '"int | None"' in errors[1]


def test_an_editable_install_is_a_path_that_checkers_follow():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}  # else setuptools makes an import hook, which they do not run
