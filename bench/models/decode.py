"""Measures tokens per second of greedy generation by a language model as its folder holds it (packed or float)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gs_algos.llm.load import load_language_model

PROMPT = "In the beginning God created"
TOKENS = 64
ROUNDS = 3  # the fastest counts


def decode_rows(folder: Path, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Returns one row: rate of tokens after the first, in bf16, batch 1; rounds go on for at least `seconds`."""
    model, tokenizer = load_language_model(folder, device=device, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)

    def run(count: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(2)
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while len(rates) < ROUNDS or time.perf_counter() < stop:
        first, all_ = run(1), run(TOKENS)
        rates.append((TOKENS - 1) / (all_ - first))
    nbytes = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    yield {"network": folder.name, "per_s": round(max(rates), 2), "nbytes": nbytes, "dtype": "bfloat16", "batch": 1}
