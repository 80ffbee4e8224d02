"""`python prepare.py GGUF FOLDER [--heads 12 4] [--dtype bfloat16]`: the float model of a GGUF file as a folder.

`--heads` adds attention heads of zeros, which change nothing that the model computes: SmolLM2-135M has 9 heads and 3
for keys and values, which no two processes can share evenly.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gs_algos.llm.load import DTYPES, load_language_model


def save_float(model: Any, tokenizer: Any, folder: str, heads: list[int] | None) -> None:
    config = model.config
    config.__dict__.pop("quantization_config", None)
    if heads:
        config.head_dim = config.hidden_size // config.num_attention_heads
        config.num_attention_heads, config.num_key_value_heads = heads
    fresh = type(model)(config)  # transformers saves no model that was read from GGUF
    fresh.generation_config = model.generation_config
    given = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        part = tuple(slice(0, size) for size in given[name].shape)
        tensor.zero_()[part] = given[name]
    fresh.to(next(model.parameters()).dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--heads", type=int, nargs=2, help="in all, and for keys and values")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    with torch.no_grad():
        save_float(*load_language_model(args.gguf, dtype=DTYPES[args.dtype]), args.folder, args.heads)


if __name__ == "__main__":
    main()
