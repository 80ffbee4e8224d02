"""Measures decoding by a whole language model of random weights: a step as one CUDA graph, and launch by launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import record
from bench.gpu.items import Context, Failed, Item, Row
from bench.models.decode import GROUPS, RANDOM, TOKENS, rows_of_width
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels import PackedWeight, qmatmul
from gs_kernels.pack.layouts import PLANAR, codes_shape

MODEL = "llama-8b"
PROMPT = 8  # tokens


@dataclass(frozen=True)
class Decode(Item):
    """Measures the model in bf16 (0 bits), or packed to some bits."""

    def run(self, context: Context) -> Iterator[Row]:
        trouble = ""
        for row in rows_of_width(MODEL, context.device, context.seconds, self.bits):
            yield {"kind": "decode", **record.environment(context.device), **row}
            trouble = row.get("error", trouble)
        if trouble:
            raise Failed(trouble)

    def make_up(self, context: Context) -> Iterator[Row]:
        n = sum(rows * columns for rows, columns in self._layers())
        nbytes = n * (self.bits or 16) // 8
        weights = f"int{self.bits}@group:{GROUPS[0]}" if self.bits else "bfloat16"
        model = {"network": MODEL, "dtype": "bfloat16", "batch": 1, "weights": weights, "nbytes": nbytes}
        for graph, slower in ((True, 1.2), (False, 4.0)):
            ms = slower * nbytes / context.ceilings["copy_gbps"] / 1e6
            rates = {"per_s": round(1e3 / ms, 2), "first_ms": round(2 * ms, 2), "prompt": PROMPT, "tokens": TOKENS}
            yield {"kind": "decode", **model, "graph": graph, **rates}

    def launch(self, context: Context) -> None:
        if self.bits == 0:
            return
        for n, k in sorted(set(self._layers())):
            weight = _empty(self.bits, n, k)
            for m in (1, PROMPT):
                qmatmul(torch.empty(1, m, k, dtype=torch.bfloat16, device="meta"), weight)

    def _layers(self) -> list[tuple[int, int]]:
        """Returns (N, K) of every linear layer."""
        about: dict[str, Any] = RANDOM[MODEL]
        k, inner, heads = about["hidden_size"], about["intermediate_size"], about["num_attention_heads"]
        few = k // heads * about["num_key_value_heads"]
        block = [(k, k), (few, k), (few, k), (k, k), (inner, k), (inner, k), (k, inner)]
        return [*block * about["num_hidden_layers"], (about["vocab_size"], k)]


def _empty(bits: int, n: int, k: int) -> PackedWeight:
    """Makes a weight without values, as `quantize_weights` packs one of a bf16 model for a GPU."""
    weight = PackedFormat(bits, (n, k), GROUPS[0], float(2 ** (bits - 1)), "bfloat16").empty("meta")
    codes = torch.empty(codes_shape(PLANAR, n, k, bits), dtype=torch.int16, device="meta")
    return replace(weight, codes=codes, layout=PLANAR)


def decode_lines(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each decoded row: tokens per second, and how many times those of bf16 run the same way."""
    rows = [row for row in rows if row.get("kind") == "decode" and "per_s" in row]
    floats = {(row["network"], row["graph"]): row["per_s"] for row in rows if row["weights"] == "bfloat16"}
    lines = []
    for row in rows:
        base = floats.get((row["network"], row["graph"]))
        ratio = f"{row['per_s'] / base:.2f}x" if base else "-"
        how = "graph" if row["graph"] else "no graph"
        item = f"decode/{row['network']} {row['weights']} {how}"
        lines.append(f"{item:46} {row['per_s']:9.1f} tokens/s {ratio:>7}, first after {row['first_ms']:.1f} ms")
    return lines


ITEMS = tuple(
    Decode(f"decode/{MODEL} {f'w{bits}' if bits else 'bf16'}", "qmatmul" if bits else "", bits) for bits in (0, 4, 2, 8)
)
