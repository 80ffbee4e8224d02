"""What every way of serving a folder is compared with: Transformers' greedy tokens in fp32, on our CPU path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.serving import PROMPTS
from gs_algos.llm.load import load_language_model

TOKENS = 24


@dataclass(frozen=True)
class Completion:
    """Tokens, the log probability of each, and the one that came next to it: its token and log probability."""

    tokens: list[int]
    logps: list[float]
    seconds: list[tuple[int, float]]


def by_transformers(folder: str) -> list[Completion]:
    model, tokenizer = load_language_model(folder, dtype=torch.float32)
    results = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
        made = model.generate(**ids, **options, output_scores=True)
        tokens = made.sequences[0, ids.input_ids.shape[1] :].tolist()
        best = [score.log_softmax(-1)[0].topk(2) for score in made.scores]
        logps = [float(b.values[0]) for b in best]
        results.append(Completion(tokens, logps, [(int(b.indices[1]), float(b.values[1])) for b in best]))
    return results


def difference(want: Completion, tokens: Sequence[int], logps: Sequence[float], close: float) -> tuple[str, bool]:
    """How a completion compares, in words, and whether that is equality up to rounding.

    Log probabilities have to be within `close`. Where two tokens are no further apart than two such errors, rounding
    may choose either; what follows the other one has nothing to be compared with.
    """
    off = 0.0
    for i, (token, logp) in enumerate(zip(tokens, logps, strict=True)):
        if token != want.tokens[i]:
            runner, second = want.seconds[i]
            gap = want.logps[i] - second
            tie = token == runner and gap <= 2 * close and abs(logp - second) <= close and off <= close
            about = f"token {i} is {token}, not {want.tokens[i]}, {gap:.1e} less likely; log p within {off:.1e} before"
            return f"{'equal up to a tie' if tie else 'DIFFERENT'}: {about}", tie
        off = max(off, abs(logp - want.logps[i]))
    equal = off <= close and len(tokens) == len(want.tokens)
    return f"{'equal' if equal else 'DIFFERENT'}, log p within {off:.1e}", equal
