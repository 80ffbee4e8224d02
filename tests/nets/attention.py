"""Small networks with attention of every kind: PyTorch's own, several of Transformers, and hand-written ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = torch.arange(14).view(2, 7) % 11


class OwnAttention(nn.Module):
    """`[B, T, 24] -> [B, 4]`: `nn.MultiheadAttention` with a residual add, and a mean over tokens."""

    def __init__(self, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, heads, batch_first=True, **options)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def encoder() -> nn.Module:
    """`[B, T, 24] -> [B, T, 4]`."""
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(24, 4))


def rows(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 7, 24, generator=torch.Generator().manual_seed(seed))


def bert(heads: int = 4, **options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=heads, num_labels=3, **options))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4))


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options))


def pictures() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# name -> (what builds it, inputs)
ATTENTION: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "own": (OwnAttention, rows()),
    "encoder": (encoder, rows()),
    "bert": (bert, {"input_ids": TOKENS}),
    "bert eager": (lambda: bert(attn_implementation="eager"), {"input_ids": TOKENS}),
    "gpt2": (gpt2, {"input_ids": TOKENS}),
    "vit": (vit, {"pixel_values": pictures()}),
    "llama": (llama, {"input_ids": TOKENS}),
}
