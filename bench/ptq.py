"""Measures PTQ on a language model: `python -m bench.ptq --model FILE_OR_FOLDER --text FILE`.

A row per setting: perplexity on the first tokens of the text against the float model of the same run, the mean of the
layers' errors over rounding to nearest, seconds and peak memory of the calibration; for quantized keys and values, and
for the float model, tokens per second behind a prompt of half a window, and the bytes of the cache. Calibration reads
windows from the second half of the text, so no token is in both; a batch holds at most as many tokens as a window of
the measurement. Each row is a process of its own; `--only TEXT` runs the setting of that name, or all whose name holds
the text. Where model and text come from is told in `bench.language`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.tables.language import WEIGHTS
from gs_algos import PTQ, mixed_bits
from gs_algos.llm.calibrate import peak_memory
from gs_algos.llm.calibration_text import windows_of
from gs_algos.llm.decode import generate
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.llm.static_cache import cache_argument

PLAIN = {"correct": 0.0, "refine": 0, "bias": False, "damp": 0.01}
NEAREST = {"rounding": "nearest", "refine": 0}
HEAD = [("lm_head", None)]
CACHES = ("int8@token", "int4@token", "int4@kivi:32", "int2@kivi:32")
DECODED = 32  # tokens behind a prompt of half a window, whose speed is a row's
# name -> (weight, options of PTQ); nearest runs no calibration
SETTINGS: dict[str, dict[str, Any]] = {
    "float": {},
    **{f"{weight} nearest": {"weight": weight, **NEAREST} for weight in WEIGHTS},
    **{f"{weight} gptq alone": {"weight": weight, **PLAIN} for weight in WEIGHTS},
    **{f"{weight} gptq": {"weight": weight} for weight in WEIGHTS},
    **{
        f"{weight} {named}gptq int8@token": {"weight": weight, "act": "int8@token", "transforms": transforms}
        for weight in ("int4@group:64", "int8@channel")
        for named, transforms in (("", ()), ("smooth ", ("smooth",)), ("rotate ", ("rotate",)))
    },
    "int4@group:64 awq nearest": {
        "weight": "int4@group:64",
        "rounding": "nearest",
        "refine": 0,
        "transforms": ("awq",),
    },
    **{f"{weight} rotate gptq": {"weight": weight, "transforms": ("rotate",)} for weight in WEIGHTS},
    **{f"{weight} signround": {"weight": weight, "rounding": "signround"} for weight in WEIGHTS},
    "4.25 bits gptq": {"budget": "4.25 bits", "choices": ("int2@group:64", "int4@group:64", "int8@channel")},
    **{f"float, cache {kv}": {"kv": kv} for kv in CACHES},
    "int4@group:64 gptq, cache int8@token": {"weight": "int4@group:64", "kv": "int8@token"},
}


def main(argv: list[str] | None = None) -> int:
    args = parsed(_parser(), argv)
    torch.set_num_threads(args.threads)
    if args.setting:
        print(json.dumps(measure(args)))
        return 0
    if not args.text.is_file():
        print(f"bench.ptq: --text must be a file, got {args.text}", file=sys.stderr)
        return 2
    base: dict[str, Any] = {}
    for name in SETTINGS:
        if name in ("float", args.only) or (args.only in name and args.only not in SETTINGS):
            row = _own_process(args, name)
            base = base or row
            row["perplexity_change"] = round(row["perplexity"] / base["perplexity"] - 1, 6)
            text = {"text": args.text.name, "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest()[:16]}
            record.append({"model": args.model.name, "setting": name, **text, **row}, kind="ptq", device="cpu")
            print(name, row, flush=True)
    return 0


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Returns the options, with --window; exits with one line about a count that is too small."""
    args = parser.parse_args(argv)
    args.window = args.context if args.window is None else args.window
    for name, least in (("tokens", 2), ("context", 2), ("window", 2), ("samples", 1), ("steps", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be >= {least}, got {getattr(args, name)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ptq", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file or a Transformers folder")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that perplexity is measured on")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16, help="windows that are calibrated on")
    parser.add_argument("--window", type=int, help="tokens of a window that is calibrated on; default: --context")
    parser.add_argument("--steps", type=int, default=200, help="of signround, a block")
    parser.add_argument("--only", default="", help="the setting of this name, or all whose name holds it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--setting", default="", help=argparse.SUPPRESS)
    return parser


def _own_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    options = {"model": args.model, "text": args.text, "tokens": args.tokens, "context": args.context}
    options |= {"samples": args.samples, "window": args.window, "steps": args.steps}
    options |= {"threads": args.threads, "setting": name}
    command = [sys.executable, "-m", "bench.ptq", *(str(part) for pair in options.items() for part in _flag(*pair))]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=dict(os.environ))
    if done.returncode != 0:
        raise RuntimeError(f"bench.ptq: {name} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _flag(name: str, value: object) -> tuple[str, str]:
    return f"--{name}", str(value)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Quantizes the model by one setting and measures it."""
    options = dict(SETTINGS[args.setting])
    model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    words = args.text.read_text(encoding="utf-8")
    ids = first_tokens(tokenizer, words, args.tokens)
    kv, weights = options.get("kv"), bool(options.keys() - {"kv"})
    row: dict[str, Any] = {"context": args.context, "samples": args.samples if weights else 0}
    if weights:
        windows = calibration_windows(tokenizer, words, args.samples, args.window)
        batches = [{"input_ids": ids} for ids in windows.split(max(1, args.context // args.window))]
        if args.window != args.context:
            row["window"] = args.window
        if options.get("rounding") == "signround":
            row["steps"] = options["steps"] = args.steps
        rules: list[Any] = [*HEAD]
        if "budget" in options:
            found = mixed_bits(model, batches[:8], options.pop("budget"), options.pop("choices"), rules=HEAD)
            rules += found.rules
            row["bits"], row["schemes"] = round(found.bits, 3), Counter(found.schemes.values())
        algo = PTQ(rules=rules, **options)
        model = algo.apply(model, batches[0])
        if algo.config.rounding != "nearest" or algo.config.transforms:
            cpu = sum(os.times()[:4])
            algo.calibrate(model, batches)
            row["cpu_seconds"] = round(sum(os.times()[:4]) - cpu, 1)
            assert algo.report is not None
            layers = algo.report.layers
            row["ratio"] = round(statistics.fmean(layer.ratio for layer in layers), 4)
            row["held_out"] = round(statistics.fmean(layer.held_out or 0.0 for layer in layers), 4)
            row["seconds"] = round(algo.report.seconds, 1)
            row["block_errors"] = [round(block.error, 5) for block in algo.report.blocks]
        row["peak_bytes"] = peak_memory()
        model = algo.convert(model)
    result = perplexity(model, ids, args.context, progress=False, kv=kv)
    if kv is not None or not weights:
        row |= _decoding(model, ids[None, : args.context // 2], kv)
    return {**row, "perplexity": round(result.value, 4), "tokens": result.tokens}


def _decoding(model: Any, ids: torch.Tensor, kv: str | None) -> dict[str, Any]:
    """Measures tokens per second behind a prompt, and the bytes of the cache then."""
    clock = Clock()
    model.generation_config.eos_token_id = None  # no row ends early
    generate(model, ids, max_new_tokens=DECODED + 1, streamer=clock, kv=kv)
    row = {"tokens_per_s": round(DECODED / (clock.times[-1] - clock.times[1]), 2)}
    if kv is None:
        return row
    from gs_algos.llm.kv_cache import kv_cache

    cache = kv_cache(model, kv)
    with torch.no_grad():
        model(ids, **{cache_argument(model): cache})
    return {**row, "nbytes_cache": cache.nbytes}


class Clock:
    """Is a streamer that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing."""


def calibration_windows(tokenizer: Any, text: str, count: int, size: int) -> torch.Tensor:
    """Returns windows `[count, size]`, as those of `windows_of`, from the beginning of the second half of a text.

    Raises:
        ValueError: if there are not as many tokens.
    """
    ids = first_tokens(tokenizer, text[len(text) // 2 :], count * size)
    if len(ids) < count * size:
        raise ValueError(f"the second half of the text must have {count} x {size} tokens, got {len(ids)}")
    return torch.cat(windows_of(tokenizer, ids, size)[:count])


def first_tokens(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """Returns the first `count` tokens of a text, `[count]`."""
    return tokenizer(text[: count * 16], return_tensors="pt", verbose=False).input_ids[0, :count]


if __name__ == "__main__":
    raise SystemExit(main())
