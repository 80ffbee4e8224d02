"""`python check_libraries.py`: GPTQ and AWQ checkpoints through the libraries that own them, in both directions.

Run by libraries.sh, in an environment with GPTQModel, which Transformers loads both formats by. What we export is
loaded by `from_pretrained` and dequantized by the library; what the library quantized is imported and dequantized by
us. Exits with 1 if a weight differs in a bit, or a model's tokens do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.module import Packed

sys.path.insert(0, str(Path(__file__).parents[1]))  # not above it: other packages bring a module `tests`
from language_models import save_folder, tiny_llama

IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])
SIZES = {"hidden_size": 128, "intermediate_size": 256}  # AWQ clips 64 rows at a time, and sums groups of at most 256
EXPORTS: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "gptq 4 bit": ("int4@group:32", []),
    "gptq 2 bit": ("int2@group:32", []),
    "gptq 8 bit, a group a row": ("int8@channel", []),
    "gptq 4 bit, zero points": ("int4@group:32:asym", []),
    "gptq uneven layers": ("int4@group:32", [("model.layers.1.mlp", "int8@channel"), ("re:.*v_proj", None)]),
    "awq 4 bit": ("int4@group:32", []),
    "awq 4 bit, zero points": ("int4@group:32:asym", [("re:.*v_proj", None)]),
    "awq 4 bit, a group a row": ("int4@channel:asym", []),
}
LIBRARY: dict[str, dict[str, Any]] = {
    "gptq 4 bit": {"bits": 4, "group_size": 32},
    "gptq 2 bit, zero points": {"bits": 2, "group_size": 32, "sym": False},
    "gptq 8 bit, a group a row": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "awq 4 bit": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
}


def by_library(folder: Path, native: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """(fp16 weights `[N, K]` that the library makes of its packed layers, logits of its model).

    Args:
        native: by GPTQModel's own loader; else by Transformers, which has no notion of layers of another width.
    """
    if native:
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "dequantize_weight"):
            weights[name] = layer.dequantize_weight().T
        elif hasattr(layer, "awq_weight_dequantize"):
            weights[name] = layer.awq_weight_dequantize(device="cpu", dtype=torch.float16).T
    with torch.no_grad():
        return weights, model(IDS).logits.float()


def by_us(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    model, _ = load_language_model(folder, dtype=torch.float32)
    weights = {name: m.weight.to(torch.float16) for name, m in model.named_modules() if isinstance(m, Packed)}
    with torch.no_grad():
        return weights, model(IDS).logits


def agree(what: str, theirs: tuple[dict[str, Tensor], Tensor], ours: tuple[dict[str, Tensor], Tensor]) -> bool:
    layers = theirs[0].keys() & ours[0].keys()
    floats = ours[0].keys() - layers  # what the format has no place for, exactly as it was
    wrong = [name for name in sorted(layers) if not torch.equal(theirs[0][name], ours[0][name])]
    complete = bool(layers) and layers == theirs[0].keys() and floats <= {"lm_head"}
    apart = float((theirs[1] - ours[1]).abs().max() / ours[1].abs().max())
    same = complete and not wrong and apart < 0.02  # their kernels compute in 16 bits
    verdict = "equal" if same else f"DIFFERENT: {wrong[:3] or 'layers or logits'}"
    print(f"{what}: {len(layers)} layers {verdict}, logits within {apart:.1e}", flush=True)
    return same


def exports(work: Path) -> int:
    """How many exports a library reads otherwise than we meant."""
    wrong = 0
    for i, (what, (weights, rules)) in enumerate(EXPORTS.items()):
        packed, out = work / f"packed-{i}", work / f"out-{i}"
        quantize_checkpoint(work / "float", packed, weights, rules=rules, progress=False)
        export_language_model(packed, out, what.split()[0])
        wrong += not agree(f"exported, {what}", by_library(out, native="uneven" in what), by_us(packed))
    return wrong


def imports(work: Path) -> int:
    """How many checkpoints that the library quantized we read otherwise than it does."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 23, (32,), generator=generator).tolist(), "attention_mask": [1] * 32}
        for _ in range(16)
    ]
    wrong = 0
    for i, (what, settings) in enumerate(LIBRARY.items()):
        theirs, ours = work / f"theirs-{i}", work / f"ours-{i}"
        model = GPTQModel.load(str(work / "float"), QuantizeConfig(**settings), device="cpu")
        model.quantize(data, batch_size=4, backend=BACKEND.AWQ_TORCH if what.startswith("awq") else BACKEND.GPTQ_TORCH)
        model.save(str(theirs))
        import_language_model(theirs, ours)
        wrong += not agree(f"imported, {what}", by_library(theirs), by_us(ours))
    return wrong


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_folder(work / "float", tiny_llama(False, **SIZES))
        return 1 if exports(work) + imports(work) else 0


if __name__ == "__main__":
    raise SystemExit(main())
