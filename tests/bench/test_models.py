"""Whole networks: every phase gets a row with time and memory, and a network that fails does not stop the others."""

import json
import os

import pytest
import torch
from torch import nn

from bench import convolutions
from bench.models import __main__ as command
from bench.models import decode, llama_cpp
from bench.models.networks import NETWORKS, LlamaBlock, Network, resnet
from gs_algos.core.memory import nbytes_of, peak_bytes
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama


def _tiny(quick):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _broken(quick):
    raise ValueError("no such network")


@pytest.fixture
def rows(monkeypatch, tmp_path):
    networks = {"tiny": Network(_tiny, lambda quick: (3, 8, 8), 2), "broken": Network(_broken, lambda quick: (1,), 2)}
    monkeypatch.setattr(command, "NETWORKS", networks)

    def run(*flags):
        out = tmp_path / "rows.jsonl"
        code = command.main(["--device", "cpu", "--quick", "--seconds", "0.001", "--out", str(out), *flags])
        return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return run


def test_a_network_is_trained_converted_and_timed_beside_float(rows, capsys):
    code, written = rows("--network", "tiny", "--algorithm", "float", "simqat-w4a8")
    assert code == 0
    phases = [(row["algorithm"], row["phase"], row["batch"]) for row in written]
    assert phases == [
        (algorithm, phase, batch)
        for algorithm in ("float", "simqat-w4a8")
        for phase, batch in (("train", 4), ("latency", 1), ("throughput", 4))
    ]
    for row in written:
        assert row["kind"] == "model" and 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert written[3]["saved_bytes"] > written[0]["saved_bytes"] > 0
    assert all(row["peak_bytes"] > 0 for row in written)
    assert written[5]["nbytes"] < written[2]["nbytes"]
    assert written[5]["per_s"] == pytest.approx(4e3 / written[5]["ms_p50"], rel=0.02)
    assert "simqat-w4a8" in capsys.readouterr().out


def test_our_exports_are_timed_in_onnx_runtime(rows):
    pytest.importorskip("onnxruntime")
    code, written = rows("--network", "tiny", "--algorithm", "float", "simqat-w8a8", "--onnx-runtime")
    assert code == 0
    theirs = [row for row in written if row["algorithm"] == "simqat-w8a8 in ONNX Runtime"]
    assert [(row["phase"], row["batch"]) for row in theirs] == [("latency", 1), ("throughput", 4)]
    assert all(row["version"] and row["ms_p50"] > 0 for row in theirs)


def test_the_bfloat16_network_predicts_with_half_the_bytes(rows):
    code, written = rows("--network", "tiny", "--algorithm", "float", "bfloat16")
    assert code == 0
    assert [row["phase"] for row in written[3:]] == ["latency", "throughput"]
    assert written[3]["nbytes"] < 0.6 * written[1]["nbytes"]


def test_a_network_that_fails_is_a_row_and_the_run_goes_on_and_fails(rows):
    code, written = rows("--network", "broken", "tiny", "--algorithm", "float")
    assert code == 1
    assert written[0]["error"] == "ValueError: no such network"
    assert [row["phase"] for row in written[1:]] == ["train", "latency", "throughput"]


def test_a_limit_starts_nothing_new_and_says_so(rows, capsys):
    assert rows("--network", "tiny", "--limit", "-1") == (1, [])
    assert "reached before tiny float" in capsys.readouterr().out


@pytest.mark.parametrize("depth, millions", [(18, 11.69), (50, 25.56)])
def test_resnets_have_the_parameters_of_the_paper(depth, millions):
    with torch.device("meta"):
        net = resnet(depth)
        y = net(torch.empty(2, 3, 224, 224))
    assert y.shape == (2, 1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_llama_block_is_causal_and_keeps_its_shape():
    block = LlamaBlock(32, 4, 2, 48)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    y, changed = block(x), block(torch.cat([x[:, :4], -x[:, 4:]], 1))
    assert y.shape == x.shape
    torch.testing.assert_close(y[:, :4], changed[:, :4])
    assert not torch.allclose(y[:, 4], changed[:, 4])


def test_every_network_takes_the_inputs_that_are_made_for_it():
    for network in NETWORKS.values():
        with torch.device("meta"):
            net = network.build(True)
        x = network.inputs(2, True, "cpu").to("meta")
        assert net(x).shape[0] == 2


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4, bias=False)
    assert nbytes_of(nn.Sequential(layer, layer)) == 64


def test_decoding_gives_a_rate_of_each_width_and_the_bytes_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "TOKENS", 4)
    model = tiny_llama()
    folder = save_folder(tmp_path / "tiny", model)
    rows = list(decode.decode_rows(str(folder), "cpu", 0.0))
    assert [row["weights"] for row in rows] == ["bfloat16", "int8@group:32", "int4@group:32", "int2@group:32"]
    assert all(row["network"] == "tiny" and row["per_s"] > 0 and row["first_ms"] > 0 for row in rows)
    assert not any(row["graph"] for row in rows)
    assert rows[0]["nbytes"] >= 2 * sum(p.numel() for p in model.parameters())
    assert rows[0]["nbytes"] > rows[1]["nbytes"] > rows[2]["nbytes"] > rows[3]["nbytes"]


def test_a_packed_folder_is_decoded_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "TOKENS", 4)
    save_folder(tmp_path / "float", tiny_llama())
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed", "int4@group:32", progress=False)
    (row,) = decode.decode_rows(str(tmp_path / "packed"), "cpu", 0.0)
    assert (row["network"], row["weights"]) == ("packed", "as stored")


def test_a_random_model_is_decoded_and_an_error_is_a_row(monkeypatch):
    monkeypatch.setattr(decode, "TOKENS", 4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(decode.RANDOM, "small", {**sizes, "vocab_size": 40})
    rows = list(decode.decode_rows("small", "cpu", 0.0, widths=(4, 3)))
    assert [row["weights"] for row in rows] == ["bfloat16", "int4@group:32", "int3"]
    assert "bits must be one of 1, 2, 4, 8" in rows[2]["error"]
    assert rows[1]["nbytes"] < rows[0]["nbytes"]


def test_the_peak_is_what_is_alive_at_once():
    x = torch.ones(1 << 18)

    def call() -> None:
        a = x + 1
        b = a * 2
        del a
        (b + b).sum()

    assert 2 * x.nbytes <= peak_bytes("cpu", call) < 2.1 * x.nbytes


def test_a_row_of_llama_cpp_holds_what_its_script_says_or_the_error(monkeypatch, tmp_path):
    gguf, node = tmp_path / "model.gguf", tmp_path / "node"
    gguf.write_bytes(bytes(7))
    node.write_text('#!/bin/sh\ntest -f "$1" && echo \'{"prompt": 5, "first_ms": 1.234, "per_s": 56.789}\'\n')
    node.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    row = llama_cpp.llama_cpp_row(str(gguf), tmp_path)
    assert (row["per_s"], row["first_ms"], row["nbytes"], row["network"]) == (56.79, 1.23, 7, "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "node"]
    node.write_text("#!/bin/sh\necho 'Error: no package' >&2\nexit 1\n")
    assert llama_cpp.llama_cpp_row(str(gguf), tmp_path)["error"] == "CalledProcessError: Error: no package"
    assert "error" in llama_cpp.llama_cpp_row(str(gguf), tmp_path / "nowhere")


@pytest.mark.parametrize("name, count", [("mobilenetv3", 2_542_856), ("efficientnet", 5_288_548)])
def test_networks_of_papers_have_their_parameters(name: str, count: int):
    assert sum(p.numel() for p in NETWORKS[name].build(True).parameters()) == count


def test_a_batch_of_no_images_is_refused(capsys: pytest.CaptureFixture[str]):
    for main in (command.main, convolutions.main):
        with pytest.raises(SystemExit):
            main(["--batch", "0"])
        assert "--batch must be >= 1, got 0" in capsys.readouterr().err
