"""A packed folder through `from_pretrained` with the options people give it, and adapters on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gs_algos import PackedLinear
from gs_algos.export import transformers_quantizer
from gs_algos.export.checkpoint import quantize_checkpoint
from tests.language_models import save_folder, tiny_llama

IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("packed")
    save_folder(base / "float", tiny_llama())
    quantize_checkpoint(base / "float", base / "packed", "int4@group:32", embeddings="int8@group:32", progress=False)
    return base / "packed"


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    assert transformers_quantizer.GoldenStickQuantizer.__name__  # importing it is what registers the format
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str
)
def test_what_is_saved_again_is_the_same_and_stays_tied(options: dict[str, Any], packed: Path, tmp_path: Path):
    if "device_map" in options:
        pytest.importorskip("accelerate", reason="accelerate is not installed; it is in the extra hf")
    model = loaded(packed, **options)
    want = logits(model)
    assert want.dtype == options.get("dtype", torch.float32)
    assert model.lm_head.packed.codes is model.model.embed_tokens.codes
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", **options)
    assert torch.equal(logits(again), want)
    assert again.lm_head.packed.codes is again.model.embed_tokens.codes


def test_adapters_of_peft_train_through_packed_layers(packed: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed; nothing here depends on it")
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
