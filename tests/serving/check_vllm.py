"""`python check_vllm.py WORK [--seconds 60]`: what vLLM makes of packed folders, in fp32, is Transformers' own.

WORK holds the folders that vllm.sh makes. Exits with 1, and says where, if tokens or log probabilities differ:

- q4 behind the HTTP API, alone and with eight clients at once for some seconds; then by two processes
- ct, the export of q4 to compressed-tensors, whose layers our kernel multiplies
- q2, up to ties
- packed experts of tiny mixtures, which it makes
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import check_experts
import check_kernel
from reference import PROMPTS, TOKENS, Completion, by_transformers, difference

from bench.serving import ask, press, served

CLIENTS = 8
# rounding in fp32 moves log probabilities of the 2-bit model by 4e-3 (against fp64), those of the 4-bit one by 1e-5
CLOSE = {"q4": 1e-3, "q2": 5e-3}


def http(folder: str, seconds: float, environment: Mapping[str, str]) -> list[tuple[Any, Any]]:
    started = time.perf_counter()
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", str(CLIENTS))
    with served(folder, *options, environment=environment) as client:
        print(f"HTTP: ready in {time.perf_counter() - started:.0f} s", flush=True)
        answers = [ask(client, prompt, TOKENS) for prompt in PROMPTS]
        figures, different = press(client, CLIENTS, seconds, TOKENS)
    print(f"HTTP: {figures}", flush=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        if different[prompt] != {answer.tokens}:
            raise SystemExit(f"HTTP: {prompt!r} must have one answer, {answer.tokens}, got {different[prompt]}")
    return [(answer.tokens, answer.logps) for answer in answers]


def engine(folder: str, parallel: int = 1) -> list[tuple[Any, Any]]:
    """What an engine makes of the prompts: one of several processes, or one in this process, which needs no start.

    An engine in this process keeps vLLM's settings as they are then: one of several has to come before it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(parallel > 1))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(parallel))) if parallel > 1 else "nobind"
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True}
    started = time.perf_counter()
    llm = LLM(folder, tensor_parallel_size=parallel, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1)
    made = [o.outputs[0] for o in llm.generate(list(PROMPTS), sampling, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    print(f"{folder}: {time.perf_counter() - started:.0f} s", flush=True)
    return [(o.token_ids, [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in made]


def compare(what: str, want: list[Completion], got: list[tuple[Any, Any]], close: float) -> int:
    """How many prompts differ."""
    wrong = 0
    for prompt, expected, (tokens, logps) in zip(PROMPTS, want, got, strict=True):
        said, equal = difference(expected, tokens, logps, close)
        print(f"{what}, {prompt!r}: {said}", flush=True)
        wrong += not equal
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work")
    parser.add_argument("--seconds", type=float, default=60, help="of eight clients at once")
    args = parser.parse_args()
    os.chdir(args.work)
    check_kernel.main()
    q4, q2 = by_transformers("q4"), by_transformers("q2")
    settings = dict(os.environ)
    wrong = compare("q4 by two processes", q4, engine("q4", 2), CLOSE["q4"])
    with ThreadPoolExecutor(1) as beside:  # mostly waits for its server to start
        answers = beside.submit(http, "q4", args.seconds, settings)
        os.environ["VLLM_DISABLED_KERNELS"] = check_kernel.THEIRS  # it would come before ours, and has no fp32
        wrong += compare("q4 as compressed-tensors", q4, engine("ct"), CLOSE["q4"])
        wrong += compare("q2", q2, engine("q2"), CLOSE["q2"])
        wrong += check_experts.check(Path("experts"))
        wrong += compare("q4 over HTTP", q4, answers.result(), CLOSE["q4"])
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
