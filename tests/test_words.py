"""Words that were replaced by those of the field do not come back, and docstrings begin with what happens."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import gs_algos
import gs_kernels

ROOT = Path(gs_algos.__file__).parents[1]
FILES = sorted(path for name in ("gs_kernels", "gs_algos", "bench") for path in (ROOT / name).rglob("*.py"))

# names, whole -> what the thing is called now
RETIRED_NAMES = {
    "BroughtAlong": "PrecomputedBatchNorm",
    "CodesTensor": "QuantizedTensor",
    "Draft": "NodeDraft",
    "Exchanged": "InterchangeResult",
    "Follows": "PossibleEpilogue",
    "Habit": "TrainingDefaults",
    "Into": "RequantParams",
    "Irreplaceable": "CoupledBatchNorm",
    "KeepsDtypes": "FixedDtypeBuffers",
    "Lanes": "InterleavedWeight",
    "Names": "ModuleNames",
    "PassedOver": "BypassedBatchNorm",
    "Pending": "DeferredOutput",
    "RunRecipe": "Recipe",
    "ScopConfig": "SCOPConfig",
    "Searched": "SearchedLayer",
    "Tailed": "WithChildren",
    "Window": "ConvGeometry",
    "Written": "QuantizeResult",
}
# words inside any such name -> what to say
RETIRED_WORDS = {
    "brought": "precomputed",
    "chain": "fused function, or pattern",
    "chains": "fused functions",
    "habit": "defaults",
    "hands": "emits",
    "kept": "derived, fixed_dtype or set_weight",
    "lanes": "interleaved",
    "misfits": "errors",
    "pending": "deferred",
    "rung": "tracer",
    "said": "logged",
    "strangers": "foreign_readers",
    "tail": "norm_children",
    "window": "geometry",
}
# modules and folders, whole -> where their content is
RETIRED_MODULES = {
    "assemble": "node_builder",
    "borrowed": "shared_parameters",
    "cards": "gpu_specs",
    "exact": "integer_flow",
    "flow": "trace",
    "gate": "aot_cases",
    "gates": "channel_gates",
    "lang": "triton_lib",
    "link": "integer_flow",
    "preserve": "untouched",
    "ready": "prepared_call",
    "seen": "im2col",
    "sums": "requantize",
    "update": "optimizer_step",
    "work": "ir_cost",
}

# how a docstring begins that names a thing, or leaves its verb out; say what happens: "Returns ...", "Says whether ..."
NOUN_PHRASES = (
    *("A ", "An ", "The ", "One ", "Every ", "Each ", "All ", "No ", "Base of ", "True ", "False ", "As ", "Like "),
    *("Whether ", "What ", "Which ", "Why ", "How ", "Where ", "When "),
)


@cache
def defined() -> list[tuple[str, ast.AST]]:
    """Every module, class and function, under its file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    files = [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in FILES]
    return [(path, node) for path, tree in files for node in ast.walk(tree) if isinstance(node, kinds)]


def refusal(name: str) -> str | None:
    """What to call a thing instead; None if its name is fine."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    retired = next((word.lower() for word in words if word.lower() in RETIRED_WORDS), None)
    return RETIRED_NAMES.get(name.lstrip("_")) or (None if retired is None else RETIRED_WORDS[retired])


@pytest.mark.parametrize("package", [gs_algos, gs_kernels], ids=lambda package: package.__name__)
def test_public_names_have_no_retired_words(package):
    assert {name: refusal(name) for name in package.__all__ if refusal(name)} == {}


def test_classes_have_no_retired_words():
    classes = {f"{path}: {node.name}": node.name for path, node in defined() if isinstance(node, ast.ClassDef)}
    assert len(classes) > 200
    assert {place: refusal(name) for place, name in classes.items() if refusal(name)} == {}


def test_modules_and_folders_have_no_retired_words():
    places = {path.relative_to(ROOT).with_suffix("") for path in FILES}
    names = {(str(place), part) for place in places for part in place.parts}
    instead = {name: RETIRED_MODULES.get(name[1]) or refusal(name[1]) for name in names}
    assert {name: word for name, word in instead.items() if word} == {}


def test_retired_words_are_found():
    assert refusal("CodesTensor") and refusal("_HandsCodes") and refusal("fused_chain") and not refusal("Chained")


def test_docstrings_begin_with_what_happens():
    first = {
        f"{path}:{getattr(node, 'lineno', 1)}": (ast.get_docstring(node) or "").partition("\n")[0]
        for path, node in defined()
    }
    assert len(first) > 2000
    assert {place: line for place, line in first.items() if line.startswith(NOUN_PHRASES)} == {}
