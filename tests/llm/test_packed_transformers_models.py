"""Transformers models that are packed in memory or on disk: saved, loaded by every Auto class, and tied again."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SimQAT, quantize_weights
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])
SCHEMES: dict[str, Any] = {"weights": "int4@group:32", "embeddings": "int8@channel", "progress": False}


def outputs(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(IDS, **options)
    return result.logits if hasattr(result, "logits") else result[0]


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def causal(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_transformers_imported_after_the_package_knows_the_format():
    code = (
        "import sys, gs_algos; assert 'transformers' not in sys.modules\n"
        "import inspect, transformers.quantizers.auto as auto\n"
        "assert 'golden-stick' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_packed_in_memory_is_saved_and_loaded_with_the_same_outputs(tied: bool, tmp_path: Path):
    model = tiny_llama(tied)
    quantize_weights(model, **SCHEMES)
    again = causal(saved(model, tmp_path / "a"))
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(causal(saved(again, tmp_path / "b"))), outputs(model))


def of_inner(model: Any) -> Any:
    quantize_weights(model.model, **SCHEMES)
    return model


def of_a_wrapper(model: Any) -> Any:
    quantize_weights(nn.ModuleDict({"inside": model}), **SCHEMES)
    return model


def of_a_copy(model: Any) -> Any:
    return copy.deepcopy(quantize_weights(model, **SCHEMES))


@pytest.mark.parametrize("pack", [of_inner, of_a_wrapper, of_a_copy])
def test_parts_wrappers_and_copies_are_saved_too(pack: Callable[[Any], Any], tmp_path: Path):
    model = pack(tiny_llama(False))
    assert torch.equal(outputs(causal(saved(model, tmp_path / "a"))), outputs(model))


def test_what_load_restored_is_saved_too(tmp_path: Path):
    gs_algos.save(quantize_weights(tiny_llama(), **SCHEMES), tmp_path / "ours")
    model = gs_algos.load(tmp_path / "ours", tiny_llama)
    assert torch.equal(outputs(causal(saved(model, tmp_path / "a"))), outputs(model))


def test_a_float_network_of_the_same_config_stays_float(tmp_path: Path):
    model = tiny_llama()
    twin = type(model)(model.config).eval()
    quantize_weights(model, **SCHEMES)
    assert not hasattr(twin.config, "quantization_config")
    assert model.model.layers[0].self_attn.config is model.config is model.model.config
    assert torch.equal(outputs(causal(saved(twin, tmp_path / "a"))), outputs(twin))


def test_what_transformers_could_not_build_again_is_not_saved(tmp_path: Path):
    model, inputs = tiny_llama(), {"input_ids": IDS}
    algo = SimQAT(weight="int8@channel", act="int8@tensor:ema")
    model = algo.apply(model, inputs)
    algo.calibrate(model, [inputs])
    model = algo.convert(model.eval())
    with pytest.raises(ValueError, match=r"save_pretrained: .* of simqat; .*use gs_algos\.save"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("packed")
    save_folder(base / "float", tiny_llama(request.param))
    quantize_checkpoint(base / "float", base / "packed", **SCHEMES)
    return base / "packed"


def test_models_without_a_head_or_with_another_load_a_packed_folder(packed: Path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    want = outputs(causal(packed).model)
    assert torch.equal(outputs(AutoModel.from_pretrained(packed).eval()), want)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3).eval()
    assert torch.equal(outputs(classifier.model), want)


def test_a_base_model_is_saved_and_loaded_under_its_own_names(packed: Path, tmp_path: Path):
    from transformers import AutoModel

    base = AutoModel.from_pretrained(packed).eval()
    again = AutoModel.from_pretrained(saved(base, tmp_path / "a")).eval()
    assert torch.equal(outputs(again), outputs(base))
    assert torch.equal(outputs(causal(tmp_path / "a").model), outputs(base))
    inner = causal(packed).model
    assert torch.equal(outputs(AutoModel.from_pretrained(saved(inner, tmp_path / "b"))), outputs(base))


def test_tie_weights_leaves_packed_layers_as_they_are(packed: Path):
    for model in (quantize_weights(tiny_llama(), **SCHEMES), causal(packed)):
        want = outputs(model)
        model.tie_weights()
        model.model.tie_weights()
        assert torch.equal(outputs(model), want)


def test_packed_embeddings_are_not_resized_in_silence():
    model = quantize_weights(tiny_llama(), **SCHEMES)
    want = outputs(model)
    with pytest.raises(TypeError, match="PackedEmbedding"):
        model.resize_token_embeddings(40)
    assert torch.equal(outputs(model), want)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_to_the_same_size_is_nothing(tied: bool):
    model = quantize_weights(tiny_llama(tied), **SCHEMES)
    want = outputs(model)
    assert model.resize_token_embeddings(32) is model.model.embed_tokens
    assert torch.equal(outputs(model), want)
    for layer, name in ((model.lm_head, "out_features"), (model.model.embed_tokens, "num_embeddings")):
        with pytest.raises(ValueError, match=f"{name} must stay 32, got 40; resize the float model, then pack it"):
            setattr(layer, name, 40)


def test_names_that_transformers_changes_in_files_are_found_again(tmp_path: Path):
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    quantize_weights(model, "int8@group:32", progress=False)
    again = AutoModelForImageClassification.from_pretrained(saved(model, tmp_path / "a")).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_encoders_and_decoders_with_one_embedding_are_saved(tmp_path: Path):
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).eval()
    quantize_weights(model, **SCHEMES)
    want = outputs(model, decoder_input_ids=IDS)
    model.tie_weights()
    again = AutoModelForSeq2SeqLM.from_pretrained(saved(model, tmp_path / "a")).eval()
    assert torch.equal(outputs(again, decoder_input_ids=IDS), want)
    with pytest.raises(ValueError, match="embed_tokens, which is tied to a layer outside"):
        model.encoder.save_pretrained(tmp_path / "b")


def test_layers_of_gpt2_are_saved_and_loaded_packed(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=32, n_positions=64, **ends)).eval()
    quantize_weights(model, **SCHEMES)
    again = causal(saved(model, tmp_path / "a"))
    assert type(again.transformer.h[0].attn.c_attn).__name__ == "PackedConv1D"
    assert torch.equal(outputs(again), outputs(model))
