"""`golden-stick tune` without a GPU: it refuses to time, and predicts for a described card."""

import dataclasses

import pytest

from gs_kernels.runtime.dispatch import INTERPRET

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

import torch
from torch import nn

from gs_algos.cli.app import run
from gs_algos.cli.tune import layers_of, problems_of
from gs_kernels.tuning.shortlists import read_lists
from gs_kernels.tuning.space import Machine, find_space, spaces

TILE = {"dense": False, "scale_parts": True, "block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "programs": 0}


@pytest.fixture
def few(monkeypatch):
    for op in ("qmatmul", "qconv2d"):
        space = dataclasses.replace(spaces()[op], candidates=lambda problem: iter([TILE]))
        monkeypatch.setitem(spaces(), op, space)


def network():
    """Layers that a table may hold, and two that it may not: three channels of x, and single channels."""
    convolutions = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=2, bias=False), nn.Conv2d(24, 24, 1, groups=24)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def test_without_a_gpu_it_says_what_it_can_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["tune"]) == 2
    error = capsys.readouterr().err
    assert "needs an NVIDIA GPU to time kernels" in error and "--device a100, h100, h200, b200 ranks tiles" in error


def test_a_described_card_gets_a_ranking_that_is_called_a_prediction(few, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    about = ["--layer", "4096x4096", "--rows", "16", "--keep", "2", "--jobs", "1"]
    assert run(["tune", "--device", "h100", *about]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No GPU is timed: what the cost model predicts for NVIDIA H100" in out
    assert "qmatmul m=16 n=4096 k=4096 bits=4" in out and "scales on products" in out and "Left out: none." in out
    assert "K split until an SM has 2 programs" in out and "at least 0" not in out
    assert not list(tmp_path.iterdir())


def test_the_convolutions_of_a_network_of_ones_own_are_tuned_and_the_others_said(few, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=2), nn.Conv2d(24, 24, 1, groups=24))"
    )
    about = ["--model", "mine:build", "--input-shape", "2,3,9,9", "--jobs", "1", "--keep", "1"]
    assert run(["tune", "--device", "h100", *about]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "qconv2d m=50 n=12 k=72 groups=2 channels=8 x_bits=16" in out
    assert out.count("left out: gs_kernels.tuning: qconv2d: has a choice of tiles only for channels") == 2


def test_layers_are_those_that_a_call_runs():
    net = network()
    found = layers_of(net, torch.randn(2, 3, 9, 9))
    assert found == [((16, 3, 3, 3, 1), 98), ((24, 8, 3, 3, 2), 50), ((24, 1, 1, 1, 24), 50), ((10, 24), 2)]
    assert not any(layer._forward_hooks for layer in net.modules())


def test_a_layer_is_a_problem_for_each_width_and_for_training():
    linear = list(problems_of((4096, 1024), 16, [4, 8], [16, 8], False))
    assert linear == [
        ("qmatmul", {"m": 16, "n": 4096, "k": 1024, "bits": 4}),
        ("qmatmul_int8", {"m": 16, "n": 4096, "k": 1024, "group": 128}),
        ("qmatmul", {"m": 16, "n": 4096, "k": 1024, "bits": 8}),
        ("qmatmul_int8", {"m": 16, "n": 4096, "k": 1024, "group": 0}),
    ]
    training = list(problems_of((64, 32, 3, 3, 1), 100, [2], [8], True))
    assert training == [
        ("qconv2d", {"m": 100, "n": 64, "k": 288, "groups": 1, "channels": 32, "x_bits": 8}),
        ("fake_quant", {"by": 1, "n": 64 * 288}),
        ("fake_quant", {"by": 0, "n": 100 * 32}),
        ("slb", {"planes": 4, "itemsize": 4, "n": 64 * 288}),
        ("slb_update", {"planes": 4, "itemsize": 4, "n": 64 * 288}),
    ]
    for op, problem in (*linear, *training):
        find_space(op).check(problem)


@pytest.mark.parametrize("layer", ["4096", "4096x", "axb", "1x2x3"])
def test_a_layer_is_two_sizes_or_four(layer, capsys):
    assert run(["tune", "--layer", layer]) == 2
    assert "must be OUTPUTSxINPUTS, e.g. 4096x14336" in capsys.readouterr().err


def test_a_layer_that_no_kernel_takes_is_an_error(capsys):
    assert run(["tune", "--layer", "64x3x7x7", "--device", "h100"]) == 2
    assert "channels that are a multiple of 8" in capsys.readouterr().err


def test_a_short_list_is_ranked_for_a_card_and_keeps_the_default(few, tmp_path, capsys):
    path = tmp_path / "lists.json"
    about = ["--layer", "4096x4096", "--rows", "16", "--keep", "1", "--jobs", "1", "--shortlist", str(path)]
    assert run(["tune", "--device", "h200", *about]) == 0
    (one,) = read_lists(path)
    machine = Machine(90, 132)
    kept = [f(one.problem, machine) for f in (find_space("qmatmul").default, find_space("qmatmul").reference)]
    assert (one.op, one.problem["m"]) == ("qmatmul", 16) and list(one.tiles)[-2:] == kept
    assert "none was timed" in " ".join(capsys.readouterr().out.split())
