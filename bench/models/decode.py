"""Measures greedy decoding by language models, float and packed: tokens per second, and the time of the first token.

A model is a Transformers folder, a GGUF file, or one of `RANDOM`: random weights on the device, as times do not depend
on them. A float model is measured as it is and packed to each width of `WIDTHS`; a packed folder as it is. On a GPU a
step is measured as one CUDA graph, and launch by launch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos import quantize_weights
from gs_algos.llm.decode import Decoder, cuda_graph
from gs_algos.llm.load import load_language_model
from gs_algos.quant.packed.module import Packed

PROMPT = "In the beginning God created"
TOKENS = 64
ROUNDS = 3  # the fastest counts
WIDTHS = (8, 4, 2)  # bits of the weights; embeddings have 8
GROUPS = (128, 64, 32)  # the largest that divides the inputs of every layer
_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
RANDOM: dict[str, dict[str, Any]] = {  # sizes of Llama 3.2 1B and Llama 3 8B
    "llama-1b": {
        **_LLAMA,
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
}


def load(source: str, device: str) -> tuple[Any, Tensor]:
    """Returns a model in bf16 and the ids of a prompt `[1, T]`, both on the device.

    Raises:
        ValueError: if the source is neither one of `RANDOM` nor a model.
    """
    if source not in RANDOM:
        model, tokenizer = load_language_model(source, device=device, dtype=torch.bfloat16)
        return model, tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM[source]), dtype=torch.bfloat16)
        return model.eval(), torch.arange(8)[None]


def decode_rows(source: str, device: str, seconds: float, widths: tuple[int, ...] = WIDTHS) -> Iterator[dict[str, Any]]:
    """Yields a row for each form of the weights and way to run a step, in bf16, batch 1; an error is a row too.

    Args:
        seconds: that rounds of one row go on for at least.
        widths: that a float model is packed to.

    Raises:
        ValueError: if the source is no model.
    """
    for bits in (0, *widths):
        yield from rows_of_width(source, device, seconds, bits)


def rows_of_width(source: str, device: str, seconds: float, bits: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of one form of the weights, 0 bits for those that the source has; none to pack it twice."""
    model, ids = load(source, device)
    packed = any(isinstance(module, Packed) for module in model.modules())
    if packed and bits:
        return
    common = {"network": Path(source).name, "dtype": "bfloat16", "batch": 1}
    row: dict[str, Any] = {**common, "weights": f"int{bits}"}
    try:
        row["weights"] = _pack(model, bits) if bits else "as stored" if packed else "bfloat16"
        row["nbytes"] = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        for graph in (True, False) if torch.device(device).type == "cuda" else (False,):
            yield {**row, "graph": graph, **_rates(model, ids, graph, seconds)}
    except Exception as error:  # noqa: BLE001  Triton's own errors are of any type: each is a row
        yield {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _pack(model: Any, bits: int) -> str:
    inputs = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    group = next(size for size in GROUPS if all(width % size == 0 for width in inputs))
    scheme = f"int{bits}@group:{group}"
    quantize_weights(model, scheme, embeddings=f"int8@group:{group}", progress=False)
    return scheme


def _rates(model: Any, ids: Tensor, graph: bool, seconds: float) -> dict[str, Any]:
    """Measures the first token (the prompt, in ms) and tokens per second of the steps behind it."""
    decoder = Decoder(model, length=ids.shape[1] + TOKENS, capture=cuda_graph if graph else None)
    wait = partial(torch.cuda.synchronize, decoder.device) if decoder.device.type == "cuda" else lambda: None

    def round_() -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        decoder.start(ids)
        wait()
        first = time.perf_counter()
        for _ in range(TOKENS - 1):
            decoder.step()
        wait()
        return first - start, time.perf_counter() - first

    round_()
    times: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(times) < ROUNDS or time.perf_counter() < stop:
        times.append(round_())
    first, rest = (min(column) for column in zip(*times, strict=True))
    counts = {"prompt": ids.shape[1], "tokens": TOKENS}
    return {"per_s": round((TOKENS - 1) / rest, 2), "first_ms": round(1e3 * first, 2), **counts}
