"""Packs a language model on disk to 4 bits without data, loads it, and has it go on with a text.

    pip install 'golden-stick-triton[hf]'
    python pack_llm.py SOURCE TARGET "In the beginning"

SOURCE is a Transformers folder or a GGUF file; it is read one tensor at a time, so it may be larger than memory.
"""

from __future__ import annotations

import sys

import torch

from gs_algos import Scheme, load_language_model, quantize_checkpoint
from gs_kernels import IntFormat, PerGroup


def main(source: str, target: str, prompt: str, group: int = 64) -> str:
    weights = Scheme(IntFormat(4), PerGroup(group), symmetric=False)  # as text: int4@group:64:asym
    written = quantize_checkpoint(source, target, weights, embeddings=f"int8@group:{group}")
    print(written.plan)  # every weight: its scheme, or why it stays float
    print(f"{written.before:,} bytes before, {written.after:,} after")

    model, tokenizer = load_language_model(target)  # checked against the hashes that were written
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        text: str = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0])
    print(text)
    return text


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
