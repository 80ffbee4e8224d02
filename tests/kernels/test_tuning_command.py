"""`golden-stick tune` without a GPU: it refuses to time, and predicts for a described card."""

import pytest

from gs_kernels.dispatch import INTERPRET

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

import torch

from gs_algos.cli.app import run
from gs_kernels.tuning import tuner

TILE = {"dense": False, "scale_parts": True, "block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "programs": 0}


def test_without_a_gpu_it_says_what_it_can_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["tune"]) == 2
    error = capsys.readouterr().err
    assert "needs an NVIDIA GPU to time kernels" in error and "--device a100, h100, b200 ranks tiles" in error


def test_a_described_card_gets_a_ranking_that_is_called_a_prediction(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuner, "tiles", lambda m: iter([TILE]))
    assert run(["tune", "--device", "h100", "--layer", "4096x4096", "--rows", "16", "--keep", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No GPU is timed: what the cost model predicts for NVIDIA H100" in out
    assert "m=16 n=4096 k=4096 bits=4" in out and "scales on products" in out and "Left out: none." in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["4096", "4096x", "axb"])
def test_a_layer_is_two_sizes(layer, capsys):
    assert run(["tune", "--layer", layer]) == 2
    assert "must be OUTPUTSxINPUTS, e.g. 4096x14336" in capsys.readouterr().err
