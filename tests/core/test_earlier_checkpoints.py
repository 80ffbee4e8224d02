"""Checkpoints that version 1 wrote load, give the outputs of then bit for bit, and are converted or trained on.

The files were written by commit d7480e3. Their weights, scales and inputs are short binary fractions, so that sums are
exact in fp32 and come out the same in whatever order a CPU adds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SCOP, SLB, Prune, SimQAT
from gs_algos.core.algorithm import Algorithm, history
from gs_algos.pipeline.pipeline import Pipeline
from gs_algos.qat.slb.optim import SlbSGD

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_v1"


class Blocks(nn.Module):
    """`[B, 1, 8, 8] -> [B, 3]`: convolutions that read one another, an add, a head behind a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1 / 16)
        self.relu = nn.ReLU()
        self.first, self.first_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1 / 16)
        self.between = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.end = nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.second(self.between(self.first_norm(self.first(x))))
        return self.fc(self.end(y + self.side(x)).mean((2, 3)))


class Functional(nn.Module):
    """`[B, 1, 8, 8] -> [B, 3]`: its layers are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(Blocks().stem.weight.detach()),
            nn.Parameter(Blocks().second.bias.detach()),
        )
        self.head = nn.Parameter(Blocks().fc.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.weight, self.bias)).mean((2, 3)), self.head)


class Tied(nn.Module):
    """`[B, T] -> [B, T, 8]`: an embedding whose table the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.embed(x))))


CLASSES: dict[str, type[Algorithm]] = {"simqat": SimQAT, "functional": SimQAT, "slb": SLB, "scop": SCOP, "prune": Prune}
NAMES = sorted(folder.name for folder in FOLDER.iterdir() if folder.name != "pipeline")
TRAINED = [name for name in NAMES if name.endswith(("prepared", "decided"))]
# prepared -> what convert made of it then
CONVERTED = {name: name.rpartition("-")[0] + "-converted" for name in TRAINED if name != "scop-prepared"}


def build(name: str) -> Callable[[], nn.Module]:
    return {"functional": Functional, "quantized": Tied}.get(name.partition("-")[0], Blocks)


def resumed(name: str, net: nn.Module) -> Any:
    return CLASSES[name.partition("-")[0]].resume(net)


def expected(name: str) -> tuple[Tensor, Tensor]:
    """(inputs, outputs of then)."""
    tensors = load_file(FOLDER / name / "expected.safetensors")
    return tensors["x"], tensors["y"]


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_version_1_gives_its_outputs_bit_for_bit_and_so_does_what_it_is_saved_as(name, tmp_path):
    x, y = expected(name)
    net = gs_algos.load(FOLDER / name, build(name))
    assert torch.equal(outputs(net, x), y)
    again = gs_algos.load(gs_algos.save(net, tmp_path), build(name))
    assert torch.equal(outputs(again, x), y) and history(again) == history(net)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_training_of_version_1_is_converted_to_what_it_was_converted_to_then(name):
    x, _ = expected(name)
    net = gs_algos.load(FOLDER / name, build(name))
    net = resumed(name, net).convert(net, x)
    then = gs_algos.load(FOLDER / CONVERTED[name], build(name))
    assert torch.equal(outputs(net, x), expected(CONVERTED[name])[1])
    assert history(net) == history(then)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_of_version_1_goes_on(name):
    x, _ = expected(name)
    net = gs_algos.load(FOLDER / name, build(name))
    algo = resumed(name, net)
    steps = algo.steps
    optimizers: list[Any] = [torch.optim.SGD(net.parameters(), lr=0.01)]
    if isinstance(algo, SLB) and algo.fused_layers():
        optimizers = [torch.optim.SGD(algo.parameters(net), lr=0.01), SlbSGD(algo.fused_layers(), lr=0.01)]
    net.train()(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    algo.step()
    assert algo.steps == steps + 1 == history(net)[-1]["steps"]
    algo.convert(net, x)


def test_a_pipeline_that_version_1_left_in_its_second_stage_is_resumed(tmp_path):
    folder = shutil.copytree(FOLDER / "pipeline", tmp_path / "pipeline")
    x, y = expected("pipeline")
    before: list[Tensor] = []
    stages = Pipeline([Prune(rate=0.5), SimQAT()], folder)
    net = stages.resume(Blocks, x, lambda net, stage: before.append(outputs(net, x)))
    assert torch.equal(before[0], y)
    loaded = gs_algos.load(folder / "2-simqat", Blocks)
    assert torch.equal(outputs(loaded, x), outputs(net, x)) and outputs(net, x).sub(y).abs().max() < 0.05
    assert [(entry["algorithm"], entry["stage"]) for entry in history(loaded)] == [
        ("prune", "converted"),
        ("simqat", "converted"),
    ]


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Changes the settings of every row of the first plan that has some."""
    path = folder / "golden_stick.json"
    index = json.loads(path.read_text())
    for row in index["history"][0]["plan"]:
        if row["settings"]:
            change(row["settings"])
    path.write_text(json.dumps(index))
    return folder


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / name, tmp_path / name))


@pytest.mark.parametrize("name", ["slb-fused", "slb-weights"])
@pytest.mark.parametrize("refused", [False, True])
def test_searches_whose_flag_was_called_fused_go_on(name, refused, tmp_path):
    def as_it_was(settings: dict[str, Any]) -> None:
        settings["fused"] = settings.pop("fused_optimizer")
        if refused:  # by convert, which wrote into it
            settings.update(fused=["relu", "relu"], notes=[])

    net = gs_algos.load(edit(copied(f"{name}-prepared", tmp_path), as_it_was), Blocks)
    algo = SLB.resume(net)
    assert len(algo.fused_layers()) == (5 if name == "slb-fused" else 0)
    x, y = expected(f"{name}-converted")
    assert torch.equal(outputs(algo.convert(net, x), x), y)


@pytest.mark.parametrize("name", ["slb-fused", "slb-weights"])
def test_a_converted_search_without_that_flag_loads(name, tmp_path):
    folder = edit(copied(f"{name}-converted", tmp_path), lambda settings: settings.pop("fused_optimizer"))
    x, y = expected(f"{name}-converted")
    net = gs_algos.load(folder, Blocks)
    assert torch.equal(outputs(net, x), y)
    assert all(row["settings"]["fused_optimizer"] == (name == "slb-fused") for row in history(net)[0]["plan"])


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no scheme": ("simqat-prepared", lambda s: s.pop("weight", None), "weight must be a text, got none of stem"),
    "number as norm": ("simqat-converted", lambda s: s.update(bn=3), "bn must be a text or nothing, got bn=3 of stem"),
    "number as readers": ("simqat-prepared", lambda s: s.update(readers=3), "consumers must be a list, .*=3 of stem"),
    "text as flag": (
        "slb-fused-converted",
        lambda s: s.update(hands_codes="x"),
        "flow.to_consumers must be true or fal",
    ),
    "number as what follows": ("simqat-prepared", lambda s: s.update(follows=[]), r"got follows=\[\] of stem"),
    "text as fused": ("simqat-converted", lambda s: s.update(fused="relu"), "got fused='relu' of stem"),
    "unknown setting": (
        "simqat-prepared",
        lambda s: s.update(rotation=1),
        "no fields but weight, .*, got 'rotation' of s",
    ),
    "emptied": ("simqat-prepared", dict.clear, "settings must be there for what is not kept, .* of stem"),
    "no units": ("prune-converted", lambda s: s.pop("units"), "units must be a whole number >= 0, got none of stem"),
    "text as units": (
        "scop-prepared",
        lambda s: s.update(units="4"),
        "units must be a whole number .* got units='4' of s",
    ),
    "no layers": ("prune-prepared", lambda s: s.pop("layers"), "layers must be a list, each a text, got none of stem"),
    "no format": ("quantized", lambda s: s.update(format={"bits": 4}), "format must be .*got format=.*of embed"),
}


@pytest.mark.parametrize("name, change, words", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_plan_of_version_1_is_one_clear_line(name, change, words, tmp_path):
    folder = edit(copied(name, tmp_path), change)
    with pytest.raises(ValueError, match=f"^load: .*golden_stick.json must have a plan that .*{words}") as caught:
        gs_algos.load(folder, build(name))
    assert str(caught.value).endswith("; the checkpoint is damaged") and "\n" not in str(caught.value)
