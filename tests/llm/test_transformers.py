"""A packed folder through `from_pretrained` with the options people give it, and adapters on top."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos import PackedLinear
from gs_algos.llm import transformers_quantizer
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

ADAPTERS = "adapter_model.safetensors"
IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("packed")
    save_folder(base / "float", tiny_llama())
    options: dict[str, Any] = {"embeddings": "int8@group:32", "progress": False}
    quantize_checkpoint(base / "float", base / "packed", "int4@group:32", **options)
    quantize_checkpoint(base / "float", base / "sharded", "int4@group:32", shard_bytes=20_000, **options)
    return base / "packed"


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    assert transformers_quantizer.GoldenStickQuantizer.__name__  # importing it is what registers the format
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"torch_dtype": torch.float16},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_what_is_saved_again_is_the_same_and_stays_tied(options: dict[str, Any], packed: Path, tmp_path: Path):
    if "device_map" in options:
        pytest.importorskip("accelerate", reason="accelerate is not installed; it is in the extra hf")
    model = loaded(packed, **options)
    want = logits(model)
    assert want.dtype == options.get("dtype", options.get("torch_dtype", torch.float32))
    assert model.lm_head.packed.codes is model.model.embed_tokens.codes
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", **options)
    assert torch.equal(logits(again), want)
    assert again.lm_head.packed.codes is again.model.embed_tokens.codes


def test_adapters_of_peft_train_through_packed_layers_and_are_saved_alone(packed: Path, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is in the dev extra")
    model = loaded(packed)
    want = logits(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    config._register_custom_module({PackedLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), want)
    adapted(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    assert all(bool((grad != 0).any()) for name, grad in grads.items() if "lora_B" in name)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0).step()
    trained = logits(adapted)
    assert not torch.equal(trained, want)
    adapted.save_pretrained(tmp_path)
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in load_file(tmp_path / ADAPTERS)} == {
        "q_proj",
        "v_proj",
    }
    again = peft.PeftModel.from_pretrained(loaded(packed), tmp_path, config=config)
    assert torch.equal(logits(again), trained)


def test_the_gradient_of_the_input_passes_through_packed_layers(packed: Path):
    model = loaded(packed)
    x = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    want = tiny_llama()
    for name, module in model.named_modules():
        if hasattr(module, "packed"):
            want.get_submodule(name).weight.data = module.weight
    y = x.detach().requires_grad_()
    want(inputs_embeds=y).logits.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4 * float(y.grad.abs().max()))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def another_shape(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("files"))
    tensors = load_file(shard(folder))
    name = next(name for name in sorted(tensors) if name.endswith(".codes"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shard(folder), {"format": "pt"})


def another_byte(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-3] ^= 4
    shard(folder).write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard missing": (lambda folder: shard(folder).unlink(), r"model-00002-of-\d+\.safetensors"),
    "another shape": (
        another_shape,
        r"model\.\S+\.codes must be \[\d+, \d+\] as config\.json says, got .* in \S+model-00002",
    ),
    "a changed byte": (another_byte, r"model-00002-of-\d+\.safetensors must have SHA-256 .* the file is damaged"),
    "an unknown field": (
        lambda folder: edit_config(folder, lambda config: config.update(rotation="hadamard")),
        "fields must be of .*, got 'rotation'; update golden-stick",
    ),
    "a newer version": (
        lambda folder: edit_config(folder, lambda config: config.update(version=2)),
        "version must be at most 1, got 2; update golden-stick",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_from_pretrained_names_what_is_damaged(case: str, packed: Path, tmp_path: Path):
    spoil, words = FAULTS[case]
    folder = Path(shutil.copytree(packed.parent / "sharded", tmp_path / "copy"))
    assert logits(loaded(folder)).isfinite().all()
    spoil(folder)
    with pytest.raises((ValueError, RuntimeError, OSError), match=words):
        loaded(folder)
