"""A tiny Llama with a tokenizer, as a Transformers folder and as a GGUF file, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = "in the beginning was a word and it said let there be light so they saw that every day good night"
WORDS = TEXT.split()
IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def tiny_llama(tied: bool = True, **options: Any) -> Any:
    """A random Llama of two layers, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **(sizes | options),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """A token for each of WORDS; others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_folder(path: Path, model: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The folder as `save_pretrained` writes it."""
    model.to(dtype).save_pretrained(path, **options)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_gguf(path: Path, model: Any) -> Path:
    """The model as llama.cpp's converter would write it, its matrices in Q8_0, the file's tied head left out."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *("\u2581" + word for word in WORDS)]
    tokens += [f"<spare{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in heads:  # GGUF keeps the two halves of a rotated head interleaved
            tensor = (
                tensor.view(heads[layer.rpartition(".")[2]], 2, -1, tensor.shape[1]).transpose(1, 2).reshape_as(tensor)
            )
        data = tensor.numpy()
        if tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{names.get_name(layer)}.weight", gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(layer)}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
