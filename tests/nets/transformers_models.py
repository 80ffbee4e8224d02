"""Tiny Transformers with random weights: class of the config, its arguments, and inputs to run them on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
BERT = {**TEXT, "max_position_embeddings": 32}
LLAMA = {**BERT, "num_attention_heads": 4, "num_key_value_heads": 2}
VIT = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")},
    **{"vocab_size": 99, "d_model": 32, "decoder_start_token_id": 1},
    **SPECIAL,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
CLIP = {"text_config": {**BERT, **SPECIAL}, "vision_config": VIT, "projection_dim": 16}

# class of the config, its arguments, the inputs by shape ("ids" is a batch of token ids)
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BertConfig": (BERT, {"input_ids": "ids"}),
    "AlbertConfig": ({**BERT, "embedding_size": 16}, {"input_ids": "ids"}),
    "GPT2Config": ({"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, **SPECIAL}, {"input_ids": "ids"}),
    "OPTConfig": ({**BERT, "ffn_dim": 40, "word_embed_proj_dim": 32}, {"input_ids": "ids"}),
    "LlamaConfig": (LLAMA, {"input_ids": "ids"}),
    "Qwen2Config": (LLAMA, {"input_ids": "ids", "attention_mask": "ids"}),
    "MixtralConfig": ({**LLAMA, "num_local_experts": 2}, {"input_ids": "ids"}),
    "T5Config": (
        {"vocab_size": 99, "d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 1, "num_heads": 4},
        {"input_ids": "ids", "decoder_input_ids": "ids"},
    ),
    "WhisperConfig": (
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        {"input_features": (2, 8, 32), "decoder_input_ids": "ids"},
    ),
    "Wav2Vec2Config": (
        {
            **TEXT,
            "conv_dim": (8, 8),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        {"input_values": (2, 200)},
    ),
    "ViTConfig": (VIT, {"pixel_values": (2, 3, 32, 32)}),
    "Dinov2Config": (VIT, {"pixel_values": (2, 3, 32, 32)}),
    "CLIPConfig": (CLIP, {"input_ids": "ids", "pixel_values": (2, 3, 32, 32)}),
    "SwinConfig": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "SegformerConfig": ({**STAGES, "num_attention_heads": [1, 1, 2, 2]}, {"pixel_values": (2, 3, 64, 64)}),
    "ResNetConfig": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "RegNetConfig": ({**STAGES, "embedding_size": 8, "groups_width": 8}, {"pixel_values": (2, 3, 32, 32)}),
    "MobileNetV2Config": ({"depth_multiplier": 0.25}, {"pixel_values": (2, 3, 32, 32)}),
    "ConvNextConfig": (STAGES, {"pixel_values": (2, 3, 32, 32)}),
}


def tiny(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    options, inputs = ARCHITECTURES[name]
    ids = torch.arange(1, 17).view(2, 8)
    tensors = {key: ids if shape == "ids" else torch.ones(shape) for key, shape in inputs.items()}
    return transformers.AutoModel.from_config(getattr(transformers, name)(**options)), tensors


CAUSAL = {**LLAMA, **SPECIAL, "max_position_embeddings": 64, "initializer_range": 0.3}
WINDOWS = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# causal language models: class of the config and its arguments
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "LlamaConfig": CAUSAL,
    "Qwen2Config": CAUSAL,
    "Qwen3Config": {**CAUSAL, "head_dim": 8},
    "MistralConfig": {**CAUSAL, "sliding_window": 8},
    "Gemma2Config": {**CAUSAL, **WINDOWS},
    "Gemma3TextConfig": {**CAUSAL, **WINDOWS},
    "MixtralConfig": {**CAUSAL, "num_local_experts": 2},
    "GPT2Config": {
        **{"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
        **SPECIAL,
    },
    "OPTConfig": {**CAUSAL, "ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.3},
    "BloomConfig": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 2, **SPECIAL},
    "MambaConfig": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **SPECIAL},
}


def tiny_language_model(name: str, **options: Any) -> Any:
    """A random causal language model of two layers, fp32, that says many different tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(LANGUAGE_MODELS[name] | options))
    return transformers.AutoModelForCausalLM.from_config(config).eval()
