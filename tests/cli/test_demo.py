"""The command line and its training loop: an interrupted run continues bit for bit, and an error is one clear line."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import gs_algos
from bench import accuracy as accuracy_script
from gs_algos.cli import demo as demo_module
from gs_algos.cli import main as main_module
from gs_algos.cli.app import run
from gs_algos.cli.demo import DemoOptions, claim_folder
from gs_algos.demo.data import ImageData, make_data
from gs_algos.demo.models import build
from gs_algos.demo.train import Interrupted, TrainConfig, accuracy, interrupts, lr_at, predict, read_state, train
from gs_algos.demo.training_defaults import DEFAULTS, float_training, tuning_training

DEMO = ["demo", "--model", "lenet5", "--float-epochs", "2", "--epochs", "1", "--device", "cpu"]


def images(n: int = 60) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return make_data("noise", (x, y), (x[:20], y[:20]), shift=1, flip=True)


def net(name: str = "resnet20") -> nn.Module:
    torch.manual_seed(0)
    return build(name, in_channels=1, num_classes=4, image_size=8)


def interrupt_at(step: int):
    def on_step(done: int, total: int, loss: torch.Tensor) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("step", [1, 7, 8, 9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, optimizer, step):
    # 5 steps an epoch: 7 is inside the second, 9 its last but one
    recipe = TrainConfig(epochs=2, lr=0.05, optimizer=optimizer, batch_size=12, warmup=0.3, label_smoothing=0.1)
    whole, parts = net("lenet5"), net("lenet5")
    train(whole, images(), recipe)
    path = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted, match=rf"stopped after {step} of 10 steps; saved in .*state\.safetensors"):
        train(parts, images(), recipe, state=path, on_step=interrupt_at(step))
    resumed = net("lenet5")
    nn.init.zeros_(resumed.classifier[1].weight)
    train(resumed, images(), recipe, state=path, resume=True)
    assert same(state_of(resumed), state_of(whole))


def test_an_interrupted_quantized_run_continues_bit_for_bit(tmp_path):
    recipe, path = TrainConfig(epochs=2, lr=0.01, batch_size=12), tmp_path / "state.safetensors"
    results = []
    for interrupted in (False, True):
        algo = gs_algos.SimQAT(weight="int4@channel:lsq", quant_delay=(2, 6), fold_bn="two_conv", freeze_bn=8)
        model = algo.apply(net(), images().example())
        if interrupted:
            with pytest.raises(Interrupted):
                train(model, images(), recipe, algorithm=algo, state=path, on_step=interrupt_at(4))
            algo = gs_algos.SimQAT(weight="int4@channel:lsq", quant_delay=(2, 6), fold_bn="two_conv", freeze_bn=8)
            model = algo.apply(net(), images().example())
        train(model, images(), recipe, algorithm=algo, state=path if interrupted else None, resume=interrupted)
        assert algo.steps == 10
        results.append(state_of(algo.convert(model)))
    assert same(*results)


def test_a_finished_run_is_not_trained_again(tmp_path):
    recipe, path = TrainConfig(epochs=1, lr=0.05, batch_size=20), tmp_path / "state.safetensors"
    model = net("lenet5")
    train(model, images(), recipe, state=path)
    again, steps = net("lenet5"), []
    train(again, images(), recipe, state=path, resume=True, on_step=lambda *step: steps.append(step))
    assert steps == []
    assert same(state_of(again), state_of(model))
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_interrupt_stops_at_once_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_state_of_another_recipe_or_network_or_a_broken_one_is_refused(tmp_path):
    recipe, path = TrainConfig(epochs=1, lr=0.05, batch_size=20), tmp_path / "state.safetensors"
    train(net("lenet5"), images(), recipe, state=path)
    with pytest.raises(ValueError, match=r"same TrainConfig, it was written with lr=0\.05, got 0\.1"):
        train(net("lenet5"), images(), replace(recipe, lr=0.1), state=path, resume=True)
    with pytest.raises(ValueError, match="same network"):
        train(net("resnet20"), images(), recipe, state=path, resume=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="whole safetensors file"):
        train(net("lenet5"), images(), recipe, state=path, resume=True)


def test_a_foreign_safetensors_file_is_no_training_state(tmp_path):
    gs_algos.core.checkpoint.write_atomically(tmp_path / "x", demo_module.to_bytes({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="must be of format 'golden-stick-training'"):
        read_state(tmp_path / "x")


def test_the_learning_rate_rises_then_falls_as_half_a_cosine():
    recipe = TrainConfig(epochs=1, lr=0.5, warmup=0.25)
    rates = [lr_at(recipe, step, 40) for step in range(40)]
    assert rates[0] == 0.5 / 25
    assert rates[10] == 0.5 == max(rates)
    assert math.isclose(rates[25], 0.25)
    assert rates[39] < 0.002
    assert lr_at(replace(recipe, warmup=0.0), 0, 40) == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": -1}, "epochs must be >= 0, got -1"),
        ({"optimizer": "lamb"}, "sgd or adamw, got 'lamb'"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1\.0"),
    ],
)
def test_an_impossible_recipe_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TrainConfig(epochs=1, lr=0.1), **change)


def test_training_learns_the_digits():
    data = gs_algos.demo.data.load_data("digits")
    torch.manual_seed(0)
    model = build("resnet20", in_channels=1, num_classes=10, image_size=8)
    train(model, data, float_training("resnet20", data, epochs=4, seed=0))
    assert accuracy(predict(model, data), data) > 90


def test_every_network_has_a_recipe_and_tuning_sees_other_shuffles():
    data = images()
    assert DEFAULTS.keys() == gs_algos.demo.models.MODELS.keys()
    assert float_training("vit-tiny", data, 3, 5).optimizer == "adamw"
    assert tuning_training("resnet20", data, 3, 5).seed == 6


def test_the_demo_prints_every_stage_and_saves_what_info_describes(tmp_path, capsys):
    assert run([*DEMO, "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for word in ("float", "trained", "converted", "reloaded", "exact", "accuracy %", "bytes", "ms, 1", "parity"):
        assert word in table
    assert run(["info", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "1. simqat, converted after 22 steps: weight=int8@channel" in text
    assert "classifier.5  Linear  10x84     int8@channel:minmax:sym" in text


def test_the_demo_calibrates_what_is_not_trained(tmp_path, capsys):
    options = ["--model", "lenet5", "--float-epochs", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert run(["demo", "--algorithm", "ptq", "--weight", "int4@channel", "--act", "int8@tensor", *options]) == 0
    table = capsys.readouterr().out
    for word in ("float", "calibrated", "converted", "reloaded", "exact"):
        assert word in table
    assert "trained" not in table
    assert run(["info", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "1. ptq, converted" in text and "act=int8@tensor" in text


def digest(folder: Path) -> str:
    return json.loads((folder / "model" / "golden_stick.json").read_text())["tensors"]["sha256"]


def test_an_interrupted_demo_resumes_to_the_same_network(tmp_path, capsys, monkeypatch):
    assert run([*DEMO, "--out", str(tmp_path / "whole")]) == 0
    started, stage = [], 0

    @contextmanager
    def bar(what):
        started.append(what)
        yield interrupt_at(20 if len(started) == stage + 1 else -1)

    monkeypatch.setattr(demo_module, "bar", bar)
    for stage in (0, 1):  # of float and of quantization-aware training
        started.clear()
        parts = tmp_path / f"parts {stage}"
        assert run([*DEMO, "--out", str(parts)]) == 130
        assert "stopped after 20 of" in capsys.readouterr().err
        assert run([*DEMO, "--out", str(parts), "--resume"]) == 0
        assert digest(parts) == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--data", "cifar9"], "one of digits, fashion-mnist, mnist, cifar10, imagefolder, got 'cifar9'"),
        (["demo", "--data", "fashion-mnist:/nowhere"], "dataset-fashion-mnist"),
        (
            ["demo", "--model", "alexnet"],
            "one of lenet5, lenet5-bn, resnet20, resnet56, resnet18, mobilenetv2, ghostnet",
        ),
        (["demo", "--algorithm", "magic"], "name must be one of"),
        (["demo", "--weight", "int9@channel"], "must have 1 to 8 bits"),
        (["demo", "--model", "resnet21"], "did you mean resnet20"),
        (["demo", "--weight", "int8@chanel"], "got 'int8@chanel'; use 'int8@channel'"),
        (["demo", "--algorithm", "scop", "--weight", "int8@channel"], "scop: --weight is no option of SCOP"),
        (["demo", "--algorithm", "prune", "--act", "none"], "prune: --act is no option of Prune"),
        (["plan", "lenet5", "--algorithm", "scop", "--weight", "int8@channel"], "scop: --weight is no option of SCOP"),
        (["demo", "--algorithm", "scop", "--epochs", "0"], "--epochs must be >= 1 for scop"),
        (["demo", "--algorithm", "ptq", "--epochs", "3"], "--epochs must be 0 for ptq"),
        (
            ["demo", "--algorithm", "slb", "--model", "mlp", "--weight", "2bit"],
            "use 2bit@channel, for all or by a rule",
        ),
        (["demo", "--device", "tpu"], "--device must be"),
        (["demo", "--batch-size", "0"], "batch_size: must be in 1..1438"),
        (["demo", "--resume"], "--resume needs a folder that an earlier demo wrote"),
        (["plan", "alexnet"], "one of lenet5"),
        (["plan", "lenet5", "--input-shape", "1,1,8,8"], "--input-shape goes with package.module:function"),
        (["plan", "torch.nn:Nothing", "--input-shape", "1,2"], "must name an importable function"),
        (["plan", "torch.nn:Identity", "--input-shape", "1,-2"], "positive sizes such as 1,3,224,224, got '1,-2'"),
        (["plan", "builtins:dict", "--input-shape", "1,2"], "must return a torch.nn.Module, got dict"),
        (["info", "/nowhere"], "must hold a golden_stick.json, got /nowhere"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_option_is_a_usage_error(capsys):
    assert run(["demo", "--modle", "lenet5"]) == 2
    assert "--modle" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"golden_stick\.json"):
        run(["--debug", "info", "/nowhere"])


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match=r"--out must be a new, an empty or a demo's folder"):
        claim_folder(tmp_path, DemoOptions(), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_with_other_options_is_refused_and_a_new_start_drops_old_states(tmp_path):
    claim_folder(tmp_path, DemoOptions(), resume=False)
    (tmp_path / "float.state.safetensors").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"options of the run in .*: seed 0, got 1"):
        claim_folder(tmp_path, DemoOptions(seed=1), resume=True)
    claim_folder(tmp_path, DemoOptions(seed=1), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_plan_takes_a_network_from_an_import_path(tmp_path, capsys, monkeypatch):
    (tmp_path / "mynets_of_test_cli.py").write_text(
        "import torch\ndef small():\n    return torch.nn.Sequential(torch.nn.Linear(6, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "mynets_of_test_cli:small", "--input-shape", "4,6", "--act", "none"]) == 0
    assert "int8@channel" in capsys.readouterr().out


def test_info_of_a_damaged_checkpoint_says_so(tmp_path, capsys):
    algo = gs_algos.SimQAT(rules=[("classifier.5", None)])
    model = algo.convert(algo.apply(net("lenet5"), images().example()))
    gs_algos.save(model, tmp_path)
    assert run(["info", str(tmp_path)]) == 0
    assert "float: " in capsys.readouterr().out
    path = next(tmp_path.glob("model-*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    assert run(["info", str(tmp_path)]) == 2
    assert "whole safetensors file" in capsys.readouterr().err


def test_without_the_cli_packages_the_command_names_them(capsys, monkeypatch):
    monkeypatch.setattr(main_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main_module.main()
    assert stop.value.code == 2
    assert "pip install 'golden-stick-triton[cli]'" in capsys.readouterr().err


def test_the_training_modules_need_no_cli_package():
    code = (
        "import sys, gs_algos.demo.train, gs_algos.cli.main; print([n for n in ('typer', 'rich') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_accuracy_run_records_every_number_once(tmp_path, monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(accuracy_script.record, "append", lambda row, kind, device: rows.append((kind, row)))
    options = ["--model", "lenet5", "--data", "digits", "--float-epochs", "2", "--epochs", "1", "--batch-size", "64"]
    assert accuracy_script.main([*options, "--recipe", "simqat-w4a8", "--state", str(tmp_path), "--device", "cpu"]) == 0
    ((kind, row),) = rows
    assert kind == "accuracy"
    assert row["accuracy"].keys() == {"float", "float_continued", "trained", "converted", "reloaded"}
    assert row["accuracy"]["converted"] == row["accuracy"]["reloaded"]
    assert row["reload_exact"]
    assert row["parity"]["images"] == 359
    assert json.loads(json.dumps(row)) == row
    assert len(list(tmp_path.iterdir())) == 3


def test_an_accuracy_run_on_some_of_the_training_images_calibrates_only_and_says_both(tmp_path, monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(accuracy_script.record, "append", lambda row, kind, device: rows.append(row))
    options = ["--model", "lenet5", "--data", "digits", "--float-epochs", "2", "--epochs", "0", "--batch-size", "32"]
    options += ["--train-images", "640", "--state", str(tmp_path), "--device", "cpu"]
    assert accuracy_script.main([*options, "--recipe", "simqat-w8a8"]) == 0
    (row,) = rows
    assert (row["data"], row["train_images"], row["parity"]["images"]) == ("digits (640 to train)", 640, 359)
    assert row["recipe"] == "simqat-w8a8, calibrated only"
    assert row["accuracy"]["converted"] > row["accuracy"]["float"] - 3
    assert accuracy_script.main([*options[:-6], "--train-images", "99999", "--device", "cpu"]) == 2
    assert "--train-images: must be in 1..1438 for digits, got 99999" in capsys.readouterr().err


def test_an_accuracy_run_on_missing_data_is_one_line(capsys, tmp_path):
    assert accuracy_script.main(["--data", "cifar10:/nowhere", "--state", str(tmp_path)]) == 2
    assert "data_batch_1.bin" in capsys.readouterr().err
