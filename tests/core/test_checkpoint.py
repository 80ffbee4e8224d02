"""A checkpoint that is damaged, foreign or hostile is refused in words; what is refused reads and writes nothing."""

from __future__ import annotations

import builtins
import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import gs_algos
from gs_algos import SCOP, SLB, Prune, SimQAT, quantize_weights
from gs_algos.core import checkpoint
from gs_algos.core.algorithm import history
from tests.helpers import Untouched
from tests.nets.convolutional import SmallConvNet, images, train

INDEX = "golden_stick.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    algo = SimQAT()
    net = algo.apply(SmallConvNet(), images())
    train(net, algo, steps=1)
    return gs_algos.save(net, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets `index[a][b]... = value`, given (a, b, ..., value)."""
    *heads, last, value = path

    def change(index: dict[str, Any]) -> None:
        place: Any = index
        for head in heads:
            place = place[head]
        place[last] = value

    return change


def spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / INDEX if name == INDEX else tensor_file(folder)
        path.write_bytes(change(path.read_bytes()))

    return act


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def foreign_tensors(folder: Path) -> None:
    """Bytes that are no tensor file, under the name and the digest that the index promises."""
    junk = b"not tensors" * 9
    tensor_file(folder).write_bytes(junk)
    facts = {"file": tensor_file(folder).name, "sha256": hashlib.sha256(junk).hexdigest(), "nbytes": len(junk)}
    edit(folder, put("tensors", facts))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (shutil.rmtree, f"the folder must hold a {INDEX}, got .*copy; give a folder written by"),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"the folder must hold a {INDEX}"),
    "missing tensors": (lambda folder: tensor_file(folder).unlink(), r"must hold model-\w+.safetensors, which is miss"),
    "truncated tensors": (spoil("tensors", lambda data: data[:-7]), r"must have \d+ bytes, got \d+; it is truncated"),
    "flipped bit": (spoil("tensors", flipped), "must have SHA-256 .* the file is damaged"),
    "no tensors in it": (foreign_tensors, "must be a safetensors file"),
    "truncated index": (spoil(INDEX, lambda data: data[:60]), "must be JSON, got .* the checkpoint is damaged"),
    "binary index": (spoil(INDEX, lambda _: b"\xff\xfe\x00"), "must be JSON"),
    "bottomless index": (spoil(INDEX, lambda _: b"[" * 200_000), "must be JSON, got .*recursion"),
    "foreign index": (spoil(INDEX, lambda _: b'{"model_type": "bert"}'), "format 'golden-stick', got a foreign file"),
    "list as index": (spoil(INDEX, lambda _: b"[1, 2]"), "got a foreign file"),
    "newer version": (
        lambda folder: edit(folder, put("version", 3)),
        "version of .* must be 1 to 2, got 3; update gold",
    ),
    "unknown field": (
        lambda folder: edit(folder, put("rotation", "hadamard")),
        "must have no fields but aliases, .*, got 'rotation'; update golden-stick",
    ),
    "version before the first": (lambda folder: edit(folder, put("version", 0)), "must be 1 to 2, got 0"),
    "true as version": (lambda folder: edit(folder, put("version", True)), "must be 1 to 2, got True"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_says_what_is_wrong(folder, damage, words):
    damage(folder)
    with pytest.raises(ValueError, match=words):
        gs_algos.load(folder, SmallConvNet)


FIRST = ("history", 0)
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "file above": (put("tensors", "file", "../outside.safetensors"), r"tensor file beside it.*got '\.\./outside"),
    "absolute file": (put("tensors", "file", "/etc/passwd"), "tensor file beside it.*got '/etc/passwd'"),
    "deep file": (put("tensors", "file", "model-0123456789abcdef.safetensors/../../x"), "tensor file beside it"),
    "file with a line": (put("tensors", "file", "model-0123456789abcdef.safetensors\n"), "tensor file beside it"),
    "number as file": (put("tensors", "file", 3), "tensor file beside it.*got 3"),
    "list as file": (put("tensors", "file", ["x"]), "tensor file beside it"),
    "no file": (lambda index: index["tensors"].pop("file"), "tensor file beside it.*got None"),
    "list as tensors": (put("tensors", []), "must have tensors, with file"),
    "text as size": (put("tensors", "nbytes", "12"), "the SHA-256 and size"),
    "no digest": (put("tensors", "sha256", None), "the SHA-256 and size"),
    "list as aliases": (put("aliases", ["x"]), "aliases, a name for a name"),
    "alias of a number": (put("aliases", {"fc.weight": 3}), "aliases, a name for a name"),
    "alias of nothing": (put("aliases", {"fc.weight": "nowhere"}), "must hold nowhere, which aliases name"),
    "no history": (put("history", []), "a history of at least one entry"),
    "text as entry": (put(*FIRST, "simqat"), "a history of objects"),
    "unknown algorithm": (put(*FIRST, "algorithm", "simqta"), "unknown algorithm.*'simqta'; did you mean simqat"),
    "module as algorithm": (put(*FIRST, "algorithm", "os:system"), "names an unknown algorithm"),
    "list as algorithm": (put(*FIRST, "algorithm", ["simqat"]), "an algorithm in every history entry"),
    "unknown stage": (put(*FIRST, "stage", "pruned"), "a stage .* prepared or converted"),
    "text as steps": (put(*FIRST, "steps", "9"), "the steps of every history entry"),
    "no config": (lambda index: index["history"][0].pop("config"), "the config of every history entry"),
    "unknown option": (put(*FIRST, "config", "momentum", 1), "must make the network .* got TypeError.*momentum"),
    "bits out of range": (put(*FIRST, "config", "weight", "int9@channel"), "must have 1 to 8 bits, got .int9"),
    "no plan": (put(*FIRST, "plan", None), "the plan of every history entry"),
    "row of another kind": (put(*FIRST, "plan", [{"site": "fc"}]), "the plan of every history entry"),
    "site of another kind": (put(*FIRST, "plan", 0, "site", 3), "the plan of every history entry"),
    "unknown site": (put(*FIRST, "plan", 0, "site", "conv9"), "got ValueError: get_module: .* got 'conv9'"),
    "norm that is none": (put(*FIRST, "plan", 0, "settings", "bn", "fc"), "must make the network"),
    "no settings": (put(*FIRST, "plan", 0, "settings", {}), "must be of the form layer or join, got form=None of stem"),
    "settings of another form": (put(*FIRST, "plan", 0, "settings", {"form": "group"}), "got form='group' of stem"),
    "null as settings": (put(*FIRST, "plan", 0, "settings", None), "must be there for what is not kept, .* of stem"),
    "list as settings": (put(*FIRST, "plan", 0, "settings", []), "the plan of every history entry"),
    "unknown setting": (put(*FIRST, "plan", 0, "settings", "turn", 1), "no fields but weight, .*, got 'turn' of stem"),
    "history twice": (lambda index: index["history"].append(index["history"][0]), "must make the network"),
}


@pytest.mark.parametrize("change, words", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_reads_no_file_outside_and_is_a_value_error(folder, change, words, monkeypatch):
    shutil.copy(tensor_file(folder), folder.parent / "outside.safetensors")
    edit(folder, change)
    opened: list[str] = []
    for module, name in ((builtins, "open"), (Path, "read_bytes"), (checkpoint, "load_file")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *a, real=real: opened.append(str(path)) or real(path, *a))
    with pytest.raises(ValueError, match=words):
        gs_algos.load(folder, SmallConvNet)
    assert opened and all(Path(path).resolve().parent == folder.resolve() for path in opened)


class OtherHead(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)


class OneMore(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


class OneLess(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        del self.fc


def prepared() -> nn.Module:
    return SimQAT().apply(SmallConvNet(), images())


@pytest.mark.parametrize(
    "build, kind, words",
    [
        (
            OtherHead,
            ValueError,
            r"fc.weight must be \(5, 8\) .* got \(4, 8\) .* build_model must make the same network",
        ),
        (OneMore, ValueError, "it has extra.bias, extra.weight that the checkpoint lacks, and lacks nothing"),
        (OneLess, ValueError, "must make the network that .* was saved from, got .*'fc'; the root has stem, bn, block"),
        (lambda: SmallConvNet().bfloat16(), ValueError, r"stem.weight must be .*bfloat16, got .*float32"),
        (prepared, ValueError, "must return the float network, got one that is prepared"),
        (lambda: SmallConvNet, TypeError, "must return a nn.Module, got <class"),
        (SmallConvNet(), TypeError, "must be a function that makes the float network"),
    ],
    ids=["other shape", "more keys", "fewer keys", "other dtype", "not float", "a class", "a network"],
)
def test_a_build_model_that_makes_another_network_is_refused(saved, build, kind, words):
    with pytest.raises(kind, match=words):
        gs_algos.load(saved, build)


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="must have been through an algorithm's apply"):
        gs_algos.save(SmallConvNet(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_without_data_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"stem.weight must be a plain tensor with data"):
        gs_algos.save(prepared().to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("at", [INDEX, "safetensors"])
def test_a_save_that_is_interrupted_leaves_the_old_checkpoint_whole(folder, at, monkeypatch):
    net = gs_algos.load(folder, SmallConvNet)
    want, before = copy.deepcopy(net.state_dict()), (folder / INDEX).read_bytes()
    net.fc.weight.data.add_(1)
    real = os.replace

    def replace(source: str, target: Path) -> None:
        if str(target).endswith(at):
            raise OSError("No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        gs_algos.save(net, folder)
    monkeypatch.undo()
    assert (folder / INDEX).read_bytes() == before and not list(folder.glob(".*"))
    state = gs_algos.load(folder, SmallConvNet).state_dict()
    assert all(torch.equal(state[key], value) for key, value in want.items())
    gs_algos.save(net, folder)
    assert len(contents(folder)) == 2  # what the interrupted save left is swept up


def test_a_place_that_cannot_be_written_is_named(saved):
    net = gs_algos.load(saved, SmallConvNet)
    before = contents(saved)
    for place in (tensor_file(saved), tensor_file(saved) / "inside"):
        with pytest.raises(OSError, match=tensor_file(saved).name):
            gs_algos.save(net, place)
    assert contents(saved) == before


def test_views_of_one_storage_and_tied_weights_survive(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
            self.tied.weight = self.fc.weight
            self.register_buffer("part", self.fc.weight.detach()[:2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.tied(x) + nn.functional.pad(x @ self.part.t(), (0, 4))

    net = nn.Sequential(Views(), nn.Linear(6, 3))
    algo = SimQAT()
    net = algo.apply(net, torch.randn(4, 6))
    gs_algos.save(net, tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["aliases"]["0.tied.weight"] == "0.fc.weight" and "0.part" not in index["aliases"]
    again = gs_algos.load(tmp_path, lambda: nn.Sequential(Views(), nn.Linear(6, 3)))
    assert again[0].tied.weight is again[0].fc.weight
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


def test_history_and_steps_come_back(saved):
    net = gs_algos.load(saved, SmallConvNet)
    assert [(entry["algorithm"], entry["stage"], entry["steps"]) for entry in history(net)] == [
        ("simqat", "prepared", 1)
    ]
    with pytest.raises(RuntimeError, match="a resumed algorithm has no example inputs; give example_inputs"):
        SimQAT.resume(net).convert(net)
    with pytest.raises(RuntimeError, match="must be one that was saved while prepared"):
        SimQAT.resume(SmallConvNet())


def converted() -> nn.Module:
    algo = SimQAT(weight="uint8@channel:asym")
    return algo.convert(algo.apply(SmallConvNet(), images()))


def searched() -> nn.Module:
    return SLB(weight="2bit@channel", total_steps=4).apply(SmallConvNet(), images())


def gated() -> nn.Module:
    return SCOP(rate=0.4, select_steps=2).apply(SmallConvNet(), images())


def packed() -> nn.Module:
    return quantize_weights(SmallConvNet(), "int4@channel:asym", progress=False)


def packed_symmetric() -> nn.Module:
    return quantize_weights(SmallConvNet(), "int4@channel", progress=False)


def packed_bits() -> nn.Module:
    return quantize_weights(SmallConvNet(), "int1@channel", progress=False)


def searched_done() -> nn.Module:
    algo = SLB(weight="int2@channel", total_steps=1)
    net = algo.apply(SmallConvNet(), images())
    algo.step()
    return algo.convert(net.eval())


@pytest.mark.parametrize(
    "scheme", ["int1@channel", "int2@channel", "int4@channel", "int8@channel", "int4@channel:asym"]
)
@pytest.mark.parametrize("fill", [0.0, 3.0, -2.0])
def test_scales_that_rounding_gives_are_taken(scheme, fill, tmp_path):
    net = SmallConvNet()
    nn.init.constant_(net.fc.weight, fill)
    net = quantize_weights(net, scheme, progress=False)
    again = gs_algos.load(gs_algos.save(net, tmp_path), SmallConvNet)
    assert torch.equal(again.fc.weight, net.fc.weight)


@pytest.mark.parametrize("gamma", [-1.5, 0.0])
def test_scales_that_a_batch_norm_turns_around_are_taken(gamma, tmp_path):
    for algo in (SimQAT(), SLB(weight="int2@channel", total_steps=1)):
        net = SmallConvNet()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, gamma)
        net = algo.apply(net, images())
        algo.step()
        net = algo.convert(net.eval())
        again = gs_algos.load(gs_algos.save(net, tmp_path / algo.name), SmallConvNet).eval()
        assert torch.equal(again(images()), net(images()))


NAN, INF = float("nan"), float("inf")
VALUES: list[tuple[Callable[[], nn.Module], str, Any, str]] = [
    (prepared, "fc.input_quantizer.scale", NAN, "finite and > 0, got nan"),
    (prepared, "fc.input_quantizer.scale", 0.0, "finite and > 0, got 0.0"),
    (prepared, "fc.input_quantizer.zero", 0.25, r"whole, or a half, in -128\.\.127, got 0.25"),
    (prepared, "fc.input_quantizer.zero", 300.0, r"in -128\.\.127, got 300"),
    (prepared, "fc.input_quantizer.range", INF, "finite, got inf"),
    (prepared, "fc.input_quantizer.steps", -3, "finite and >= 0, got -3"),
    (prepared, "stem.sigma", -1.0, "finite and > 0, got -1"),
    (prepared, "fc.input_quantizer.scale", torch.float16, r"\(1,\) torch.float32, got \(1,\) torch.float16"),
    (converted, "fc.scale", NAN, "finite and > 0, got nan"),
    (converted, "fc.scale", -0.5, "finite and > 0, got -0.5"),
    (converted, "fc.scale", 0.0, "finite and > 0, got 0"),
    (converted, "fc.zero", 1e6, r"in 0\.\.255, got 1000000"),
    (converted, "fc.input_quantizer.scale", -1.0, "finite and > 0, got -1"),
    (converted, "fc.input_quantizer.zero", INF, r"in -128\.\.127, got inf"),
    (converted, "fc.bias", NAN, "finite, got nan"),
    (converted, "fc.codes", torch.float32, r"torch.uint8, got .*torch.float32"),
    (converted, "fc.codes", torch.int8, r"torch.uint8, got .*torch.int8"),
    (searched, "fc.search.logits", NAN, "finite, got nan"),
    (searched, "fc.search.temperature", -1.0, "finite and >= 0, got -1"),
    (searched, "fc.search.levels", 0.3, "what the options say, got 0.3"),
    (searched, "fc.search.scale", INF, "finite and > 0, got inf"),
    (gated, "stem.gate", NAN, "finite, got nan"),
    (gated, "block.conv2.gate_square", -1.0, "finite and >= 0, got -1"),
    (packed, "fc.scale", NAN, "finite and > 0, got nan"),
    (packed, "fc.scale", -1.0, "finite and > 0, got -1"),
    (packed_symmetric, "fc.scale", 0.0, "finite and not 0, got 0"),
    (packed_bits, "fc.scale", -1.0, "finite and >= 0, got -1"),
    (searched_done, "fc.scale", -1.0, "finite and > 0, got -1"),
    (packed, "fc.zero", 99.0, r"in -1\.\.16, got 99"),
    (packed, "fc.scale", torch.float64, "torch.float16, got .*float64"),
]


@pytest.fixture(scope="module")
def nets() -> dict[Any, nn.Module]:
    return {}


@pytest.mark.parametrize("make, key, value, words", VALUES, ids=[f"{v[0].__name__} {v[1]} {v[2]}" for v in VALUES])
def test_values_that_no_training_gives_are_refused_by_name_though_their_checksum_fits(
    make, key, value, words, nets, tmp_path
):
    if make not in nets:
        nets[make] = make()
    gs_algos.save(nets[make], tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tensor_file(tmp_path)).items()}
    if key not in tensors:
        pytest.skip(f"{key} is a constant here")
    if isinstance(value, torch.dtype):
        tensors[key] = tensors[key].to(value)
    else:
        tensors[key].view(-1)[-1] = value
    data = to_bytes(tensors)
    tensor_file(tmp_path).write_bytes(data)
    facts = {"file": tensor_file(tmp_path).name, "sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
    edit(tmp_path, put("tensors", facts))
    with pytest.raises(ValueError, match=rf"load: .*{re.escape(key)} must be .*{words}"):
        gs_algos.load(tmp_path, SmallConvNet)


DEEP: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "number as scheme": (prepared, ("plan", 0, "settings", "weight", 3), "got weight=3 of stem"),
    "text as children": (prepared, ("plan", 0, "settings", "norm_children", "x"), "got norm_children='x' of stem"),
    "numbers as consumers": (prepared, ("plan", 0, "settings", "consumers", [1]), r"got consumers\[0\]=1 of stem"),
    "flag as activation": (
        prepared,
        ("plan", 0, "settings", "epilogue", "activation", True),
        "got epilogue.activation=T",
    ),
    "number as form of output": (prepared, ("plan", 0, "settings", "flow", 3), "got flow=3 of stem"),
    "text as fused flag": (searched, ("plan", 0, "settings", "fused_optimizer", "yes"), "got fused_optimizer='yes'"),
    "number as shape": (packed, ("plan", -1, "settings", "format", "shape", 3), "got format="),
    "huge shape": (
        packed,
        ("plan", -1, "settings", "format", "shape", [2**62, 2**62]),
        "the format of a packed weight",
    ),
    "groups of nothing": (packed, ("plan", -1, "settings", "format", "group_size", 0), "format of a packed weight"),
    "type of scales": (
        packed,
        ("plan", -1, "settings", "format", "scale_dtype", "int8"),
        "the format of a packed weig",
    ),
    "steps without end": (prepared, ("steps", 10**30), "the steps of every history entry"),
    "negative steps": (prepared, ("steps", -1), "the steps of every history entry"),
    "dimension": (gated, ("groups", "slices", 0, 1, -5), "a slice must be of a tensor of the model"),
    "tensor": (gated, ("groups", "slices", 0, 0, "conv9.weight"), "a slice must be of a tensor of the model"),
    "first unit": (gated, ("groups", "groups", 0, "first", "x"), "units of a group must follow"),
}


@pytest.mark.parametrize("make, path, words", DEEP.values(), ids=DEEP)
def test_what_is_wrong_deep_in_a_history_is_refused_and_a_model_in_use_stays(make, path, words, nets, tmp_path):
    if make not in nets:
        nets[make] = make()
    gs_algos.save(nets[make], tmp_path)
    edit(tmp_path, put(*FIRST, *path))
    net = SmallConvNet()
    before = Untouched(net)
    with pytest.raises(ValueError, match=words):
        gs_algos.load(tmp_path, lambda: net)
    assert before


def test_a_model_in_use_keeps_its_tensors_when_a_pruned_checkpoint_does_not_fit(tmp_path):
    algo = Prune(rate=0.4)
    gs_algos.save(algo.convert(algo.apply(SmallConvNet(), images())), tmp_path)
    edit(tmp_path, put(*FIRST, "shapes", "fc.bias", [999]))
    net = SmallConvNet()
    before = Untouched(net)
    with pytest.raises(ValueError, match=r"fc.bias must shrink from \[4\], got \[999\]"):
        gs_algos.load(tmp_path, lambda: net)
    assert before
