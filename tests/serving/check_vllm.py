"""`python check_vllm.py DIR [--parallel 1 3]`: in fp32, vLLM's greedy tokens of a packed folder are Transformers' own.

Run by vllm.sh, in an environment with vLLM. Exits with 1, and says where, if a token differs or a log probability is
off by more than 1e-3.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

PROMPTS = ["The capital of France is", "In the beginning God created", "def fibonacci(n):"]
TOKENS = 24
CLOSE = 1e-3  # of a log probability


def by_transformers(folder: str) -> list[tuple[list[int], list[float]]]:
    import torch

    from gs_algos.export.language import load_language_model

    model, tokenizer = load_language_model(folder, dtype=torch.float32)
    results = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(
            **ids, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, ids.input_ids.shape[1] :].tolist()
        scores = [float(s.log_softmax(-1)[0, t]) for s, t in zip(made.scores, tokens, strict=True)]
        results.append((tokens, scores))
    return results


def by_vllm(folder: str, parallel: int) -> list[tuple[list[int], list[float]]]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True}
    started = time.perf_counter()
    engine = LLM(folder, tensor_parallel_size=parallel, **options)
    ready = time.perf_counter()
    made = [
        o.outputs[0] for o in engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1))
    ]
    seconds = time.perf_counter() - ready
    count = sum(len(o.token_ids) for o in made)
    print(f"tensor_parallel_size {parallel}: ready in {ready - started:.0f} s, {count / seconds:.1f} tokens/s")
    engine.llm_engine.engine_core.shutdown()
    return [(list(o.token_ids), [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in made]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--parallel", type=int, nargs="*", default=[1], help="sizes of tensor parallelism")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    want = by_transformers(args.folder)
    wrong = 0
    for parallel in args.parallel:
        for prompt, expected, got in zip(PROMPTS, want, by_vllm(args.folder, parallel), strict=True):
            off = max(abs(a - b) for a, b in zip(expected[1], got[1], strict=True))
            equal = expected[0] == got[0] and off <= CLOSE
            wrong += not equal
            verdict = "equal" if equal else f"DIFFERENT: {got[0]} instead of {expected[0]}"
            print(f"tensor_parallel_size {parallel}, {prompt!r}: {verdict}, log p within {off:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
