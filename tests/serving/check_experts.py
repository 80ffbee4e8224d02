"""Packed experts in vLLM, in fp32: tiny random mixtures give the tokens of Transformers. Run by check_vllm.py.

One folder is made on disk, whose stacks have other names than vLLM's modules, and one by `save_pretrained`.

`python check_experts.py FOLDER [--parallel 2] [--whole]` runs it alone, also by several processes, each with a part of
every expert or with whole ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from gs_algos import quantize_weights
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [[5, 17, 3, 80, 4], [400, 2, 95], [33, 1, 60, 7, 11, 12, 13, 500]]
TOKENS = 24
CLOSE = 1e-3  # of log probabilities


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=5)).eval()


def qwen3() -> Any:
    more = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": [1]}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **more)).eval()


def packed_on_disk(model: Any, scheme: str, folder: Path) -> Any:
    model.save_pretrained(folder / "float")
    quantize_checkpoint(folder / "float", folder / "packed", scheme, progress=False)
    return quantize_weights(model, scheme)


def packed_in_memory(model: Any, scheme: str, folder: Path) -> Any:
    model = quantize_weights(model, scheme)
    model.save_pretrained(folder / "packed")
    return model


CASES = ((mixtral, "int4@group:64", packed_on_disk), (qwen3, "int2@group:64:asym", packed_in_memory))


def want(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    made = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = made.sequences[0, len(prompt) :].tolist()
    return tokens, [float(row[0].log_softmax(-1)[t]) for row, t in zip(made.logits, tokens, strict=True)]


def engine(folder: Path, parallel: int, whole: bool) -> list[tuple[list[int], list[float]]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(parallel > 1))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(parallel))) if parallel > 1 else "nobind"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=True,
        tensor_parallel_size=parallel, enable_expert_parallel=whole,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    made = [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    return [(list(o.token_ids), [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in made]


def check(folder: Path, parallel: int = 1, whole: bool = False) -> int:
    """How many prompts differ."""
    wrong = 0
    for make, scheme, pack in CASES:
        torch.manual_seed(0)
        here = folder / make.__name__
        shutil.rmtree(here, ignore_errors=True)
        model = pack(make(), scheme, here)
        stacks = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
        assert not stacks, f"{stacks} stayed float"
        for prompt, (tokens, logps) in zip(PROMPTS, engine(here / "packed", parallel, whole), strict=True):
            expected, theirs = want(model, prompt)
            off = max(abs(a - b) for a, b in zip(logps, theirs, strict=True))
            equal = tokens == expected and off <= CLOSE
            print(
                f"experts of {make.__name__}, {scheme}: {'equal' if equal else 'DIFFERENT'}, log p within {off:.1e}",
                flush=True,
            )
            wrong += not equal
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parallel", type=int, default=1, help="processes")
    parser.add_argument("--whole", action="store_true", help="each has whole experts")
    args = parser.parse_args()
    raise SystemExit(check(args.folder, args.parallel, args.whole) > 0)
