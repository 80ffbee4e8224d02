"""`golden-stick analyze` and `report`, and the page that the other commands write with --report."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gs_algos.cli.app import run
from gs_algos.demo.models import build


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    page = out.parent / "demo page.html"
    arguments = ["--model", "mlp", "--float-epochs", "1", "--epochs", "1", "--weight", "int2@channel"]
    assert run(["demo", "--out", str(out), "--report", str(page), *arguments]) == 0
    return out, page


def test_a_demo_writes_the_page(demo):
    text = demo[1].read_text()
    assert "mlp, simqat" in text and "accuracy" in text and "<script" not in text


def test_a_demo_of_slb_shows_its_search(tmp_path):
    page = tmp_path / "page.html"
    arguments = ["--model", "mlp", "--algorithm", "slb", "--float-epochs", "1", "--epochs", "1"]
    assert run(["demo", "--out", str(tmp_path / "demo"), "--report", str(page), *arguments]) == 0
    assert "The search for levels" in page.read_text()


RECIPE = """
model = "lenet5"
data = "digits"
float_epochs = 1

[[stage]]
algorithm = "prune"
epochs = 1
options = { rate = 0.25 }

[[stage]]
algorithm = "slb"
epochs = 1
options = { weight = "2bit@channel" }
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The page of a recipe that is resumed although it has ended."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "run.toml").write_text(RECIPE)
    arguments = ["compress", "--recipe", f"{folder}/run.toml", "--out", f"{folder}/out", "--device", "cpu"]
    assert run(arguments) == 0
    assert run([*arguments, "--resume", "--report", f"{folder}/page.html"]) == 0
    return (folder / "page.html").read_text()


def test_a_recipe_with_slb_shows_its_search_and_its_levels(compressed):
    assert "The search for levels" in compressed and "Quantization gap" in compressed
    assert "weights at each level" in compressed


def test_a_recipe_with_pruning_shows_the_channels_that_are_left(compressed):
    assert "Output channels of layers, before and after" in compressed


def test_a_saved_network_is_compared_with_the_float_one(demo, tmp_path, capsys):
    out, page = demo[0], tmp_path / "page.html"
    assert run(["report", f"{out}/float.safetensors", f"{out}/model", "--model", "mlp", "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "smaller on disk" in printed and f"report: {page}" in printed and page.is_file()


def test_a_trained_network_is_analyzed(demo, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--weights", f"{demo[0]}/float.safetensors", "--choices", "int2@channel,int8@channel"]
    assert run(["analyze", "mlp", *arguments, "--tolerance", "0.001", "--out", str(page)]) == 0
    assert "rules=[" in capsys.readouterr().out and page.is_file()


def test_random_weights_are_said(capsys):
    assert run(["analyze", "mlp", "--choices", "int2@channel,int8@channel"]) == 0
    assert "mlp has random weights" in capsys.readouterr().out


def test_a_language_model_is_analyzed_and_reported(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from tests.nets.language_models import tiny_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    rest = ["--text", str(text), "--context", "32"]
    assert run(["analyze", str(tmp_path / "float"), *rest, "--choices", "int4@channel,int8@channel"]) == 0
    page = tmp_path / "page.html"
    arguments = ["--weights", "int4@group:32", "--report", str(page)]
    assert run(["quantize", str(tmp_path / "float"), str(tmp_path / "packed"), *arguments]) == 0
    assert "perplexity" in page.read_text()
    assert run(["report", str(tmp_path / "float"), str(tmp_path / "packed"), *rest]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "mlpp"], "mlp"),
        (["analyze", "mlp", "--weights", "nowhere"], "must be a safetensors file of the float network"),
        (["analyze", "mlp", "--by", "hessian"], "by must be one of"),
        (["analyze", "mlp", "--out", "/nowhere/page.html"], "a file in a folder that is there"),
        (["analyze", "mlp", "--tolerance", "nan"], "tolerance must be 0 nats or more"),
        (["report", ".", "b", "--model", "mlp"], "got a folder"),
        (["report", "a", "b"], "--model must say"),
        (["demo", "--report", "/nowhere/page.html"], "a file in a folder that is there"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_that_is_no_saved_network_is_refused(tmp_path, capsys):
    net = build("mlp", in_channels=1, num_classes=10, image_size=8)
    save_file(net.state_dict(), tmp_path / "float.safetensors")
    assert run(["report", str(tmp_path / "float.safetensors"), str(tmp_path), "--model", "mlp"]) == 2
    assert "CONVERTED must be a folder of gs_algos.save" in capsys.readouterr().err
