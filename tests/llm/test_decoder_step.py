"""A packed Llama or its kin on a CPU: all layers in one call of C++, with the model's tokens; else its own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gs_algos import quantize_weights
from gs_algos.llm import decode
from gs_algos.llm.decode import Decoder, run
from gs_algos.ptq.kv import KVScheme
from gs_kernels.decoder_step import cpu
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms
from tests.nets.transformers_models import tiny_language_model

if INTERPRET or cpu.kernels() is None:
    pytest.skip("the CPU's own way is not taken here: interpreted, or no C++ compiler", allow_module_level=True)

NEW = 20
SIZES = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}


def packed(scheme: str = "int4@group:16", config: str = "LlamaConfig", **options: Any) -> Any:
    model = tiny_language_model(config, eos_token_id=None, **{**SIZES, "max_position_embeddings": 64, **options})
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return quantize_weights(model, scheme, embeddings="int8@group:16", progress=False)


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 99, (rows, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any, kv: KVScheme | None = None) -> tuple[torch.Tensor, bool]:
    """Those of the tokens behind a prompt, and whether C++ computed them."""
    decoder, seen = Decoder(model, length=12 + NEW, kv=kv), []
    append = decoder._append
    decoder._append = lambda values: (seen.append(values.clone()), append(values))  # type: ignore[method-assign]
    run(decoder, prompt(), max_new_tokens=NEW)
    return torch.cat(seen), decoder._logits_of_step is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": LLAMA3},
        {"tie_word_embeddings": True},
        {"config": "MistralConfig", "sliding_window": None},
        {"config": "Qwen2Config"},
        {"config": "Qwen3Config", "head_dim": 32},
    ],
    ids=lambda options: options.get("config") or ", ".join(options) or "plain",
)
def test_logits_are_those_of_the_model(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = packed(**options)
    got, in_cpp = logits(model)
    monkeypatch.setattr(decode, "decoder_step", lambda *_: None)
    want, _ = logits(model)
    assert in_cpp and relative_rms(got, want) < 1e-5
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_logits_in_bfloat16_are_nearer_to_those_in_fp32(monkeypatch: pytest.MonkeyPatch):
    want = logits(packed())[0][:2]
    got, in_cpp = logits(packed().to(torch.bfloat16))
    monkeypatch.setattr(decode, "decoder_step", lambda *_: None)
    by_model, _ = logits(packed().to(torch.bfloat16))
    assert in_cpp and relative_rms(got[:2], want) < relative_rms(by_model[:2], want)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", ["int8@channel", "int2@group:8:asym", "int1@group:16"])
def test_tokens_are_those_of_generate(scheme: str, threads: int):
    model, before = packed(scheme), torch.get_num_threads()
    want = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    decoder = Decoder(model, length=12 + NEW)
    torch.set_num_threads(threads)
    try:
        for _ in range(2):  # a prompt behind another
            assert torch.equal(run(decoder, prompt(), max_new_tokens=NEW), want[:, 12:])
    finally:
        torch.set_num_threads(before)
    assert decoder._logits_of_step is not None


def hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_a_float_layer(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 80, bias=False)
    return model


def with_a_narrow_layer(model: Any) -> Any:
    model.model.layers[1].mlp = packed(intermediate_size=48).model.layers[1].mlp
    return model


def another_activation(model: Any) -> Any:
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    return model


OTHERS = {
    "hooks": lambda: hooked(packed()),
    "a float layer": lambda: with_a_float_layer(packed()),
    "a narrow layer": lambda: with_a_narrow_layer(packed()),
    "another activation": lambda: another_activation(packed()),
    "a sliding window": lambda: packed(config="MistralConfig", sliding_window=8),
    "windows in some layers": lambda: packed(
        config="Qwen2Config", use_sliding_window=True, max_window_layers=1, sliding_window=8
    ),
    "another family": lambda: packed(config="Gemma2Config", head_dim=16),
    "gelu": lambda: packed(hidden_act="gelu"),
    "heads of 8": lambda: packed(num_attention_heads=8, num_key_value_heads=8),
    "float16": lambda: packed().to(torch.float16),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_not_plain_is_left_to_its_forward(make: Any):
    assert not logits(make())[1]


def test_quantized_keys_rows_and_padding_are_left_to_the_forward():
    model, ids = packed(), prompt(2)
    assert not logits(model, KVScheme(8, 8))[1]
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    for rows in (1, 2):
        decoder = Decoder(model, batch=rows, length=16)
        decoder.start(ids[:rows], mask[:rows])
        assert decoder._logits_of_step is None


def test_a_token_behind_the_end_is_refused():
    model = packed()
    decoder = Decoder(model, length=13)
    decoder.start(prompt())
    decoder.step()
    with pytest.raises(RuntimeError, match="the cache is full"):
        decoder.step()
