"""Runs `golden-stick quantize`, `generate` and `perplexity`."""

from __future__ import annotations

import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gs_algos.core.arguments import as_seed
from gs_algos.core.plan import render_layers
from gs_algos.llm.calibrate import SAMPLES, calibrate_language_model
from gs_algos.llm.decode import Sampling, generate
from gs_algos.llm.libraries import library
from gs_algos.llm.load import DTYPES, load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.llm.quantize_checkpoint import QuantizeResult, quantize_checkpoint
from gs_algos.ptq.config import PTQConfig
from gs_algos.ptq.sites import WeightRule
from gs_algos.search.mixed_bits import CHOICES

RULE = re.compile(r"(?P<pattern>.+)=(?P<scheme>none|u?int\d.*|(mx|nv)fp4.*)")


def parse_rules(texts: list[str]) -> list[WeightRule]:
    """Parses `lm_head=int8@group:64` and `re:.*down_proj=none` as rules.

    Raises:
        ValueError: if a text is no pattern and scheme.
    """
    rules: list[WeightRule] = []
    for text in texts:
        match = RULE.fullmatch(text)
        if match is None:
            raise ValueError(f"quantize: --rule must be PATTERN=SCHEME or PATTERN=none, got {text!r}")
        rules.append((match["pattern"], None if match["scheme"] == "none" else match["scheme"]))
    return rules


def parse_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of that name; None for an empty one.

    Raises:
        ValueError: if it is none that a model computes in.
    """
    if name and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name] if name else None


def run_quantize(
    source: Path, target: Path, weights: str, embeddings: str, rules: list[str], kv: str, dtype: str, device: str
) -> str:
    """Packs a model, and returns a line on what was written."""
    started = time.perf_counter()
    written = quantize_checkpoint(
        source,
        target,
        weights or None,
        embeddings=embeddings or None,
        rules=parse_rules(rules),
        kv=kv or None,
        dtype=parse_dtype(dtype),
        device=device or None,
    )
    seconds = time.perf_counter() - started
    done = f"{written.folder}: {written.packed} weights packed, {written.kept} kept float; "
    lines = [f"{done}{written.before:,} -> {written.after:,} bytes ({_size(written)}) in {seconds:.1f} s"]
    totals = written.plan.totals
    assert totals is not None
    rows = [
        (row.site, row.kind, f"{numbers:,}", f"{100 * numbers / totals.numbers:.1f}", row.reason)
        for row, numbers in written.floats()
    ]
    if rows:
        share = 100 * (totals.numbers - totals.quantized) / totals.numbers
        lines.append(f"{share:.1f} % of the numbers stay float, biases and norms included:")
        lines.append(render_layers(("layer", "kind", "numbers", "% of all", "why"), rows))
    return "\n".join([*lines, *(f"note: {note}" for note in written.notes)])


@dataclass(frozen=True)
class CalibrationOptions:
    """Holds the options of `golden-stick quantize` that need data.

    rounding: "" for that of PTQ.
    transforms, choices: with commas between; "" for those of the functions.
    steps: of a rounding that is tuned; None for its own.
    """

    rounding: str
    act: str
    transforms: str
    budget: str
    choices: str
    steps: int | None
    calibration: Path | None
    samples: int
    context: int | None
    offload: bool | None
    resume: bool

    @property
    def given(self) -> bool:
        chosen = self.rounding not in ("", "nearest") or self.act or self.transforms or self.budget
        return bool(chosen or self.steps is not None or self.calibration or self.resume)

    def refuse_unless_given(self) -> None:
        """Raises ValueError if there is an option that needs a calibration, and nothing that asks for one."""
        values = {"choices": self.choices or None, "context": self.context, "offload": self.offload}
        values["samples"] = None if self.samples == SAMPLES else self.samples
        lost = ", ".join(f"--{name}" for name, value in values.items() if value is not None)
        if lost and not self.given:
            raise ValueError(
                f"quantize: {lost} is for a calibration, got none; add --calibration FILE or --rounding gptq"
            )


def run_calibrate(
    source: Path,
    target: Path,
    weights: str,
    embeddings: str,
    rules: list[str],
    kv: str,
    dtype: str,
    device: str,
    options: CalibrationOptions,
) -> str:
    """Quantizes a model with data; returns a table of its layers and lines on what was written."""
    chosen: dict[str, Any] = {"weight": weights or "int4@group:64", "embeddings": embeddings or None}
    chosen |= {"act": options.act or None, "rounding": options.rounding or "gptq", "kv": kv or None}
    chosen["steps"] = options.steps
    chosen["transforms"] = _names(options.transforms)
    if options.choices and not options.budget:
        raise ValueError("quantize: --choices needs --budget, such as --budget '4.5 bits', got none")
    ruled = [(pattern, None if scheme is None else {"weight": scheme}) for pattern, scheme in parse_rules(rules)]
    done = calibrate_language_model(
        source,
        target,
        PTQConfig(rules=tuple(ruled), **chosen),
        budget=options.budget or None,
        choices=_names(options.choices) or CHOICES,
        calibration=options.calibration,
        samples=options.samples,
        context=options.context,
        offload=options.offload,
        dtype=parse_dtype(dtype),
        device=device or "cpu",
        resume=options.resume,
    )
    totals = done.plan.totals
    assert totals is not None
    lines = [] if done.mixed is None else [str(done.mixed)]
    lines += [str(done.report), f"{done.folder}: {totals.before:,} -> {totals.after:,} bytes"]
    if done.before is not None and done.after is not None:
        lines.append(f"perplexity behind the calibration text: {done.before:.3f} -> {done.after:.3f}")
    lines.append(
        f"{done.tokens:,} tokens of {done.text}, {done.seconds:.0f} s, {done.memory:,} bytes of memory at most"
    )
    return "\n".join([*lines, *(f"note: {note}" for note in done.notes)])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _size(written: QuantizeResult) -> str:
    if written.after > written.before:
        return f"{written.after / written.before:.2f} x larger"
    return f"{written.before / written.after:.2f} x smaller"


def run_perplexity(
    path: Path,
    text: Path,
    context: int | None,
    stride: int | None,
    max_tokens: int | None,
    dtype: str,
    device: str,
    kv: str,
) -> str:
    """Measures the perplexity of a text file, and returns it as a line."""
    if not text.is_file():
        raise ValueError(f"perplexity: --text must be a file, got {text}")
    model, tokenizer = _loaded(path, dtype, device)
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"perplexity: {text} must be UTF-8 text, got {error}") from error
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0]
    started = time.perf_counter()
    result = perplexity(model, ids[:max_tokens], context, stride, kv=kv or None)
    seconds = time.perf_counter() - started
    return (
        f"perplexity {result.value:.4f} over {result.tokens:,} tokens of {text} "
        f"({result.windows} windows of {result.context}), {seconds:.1f} s"
    )


def run_generate(
    path: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, dtype: str, device: str, kv: str
) -> str:
    """Streams the continuation of a prompt to stdout; returns a line with the speed."""
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"generate: --max-new-tokens must be >= 1 and --temperature >= 0, got {max_new_tokens} and {temperature}"
        )
    as_seed(seed, "generate: --seed")
    model, tokenizer = _loaded(path, dtype, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.numel() == 0:
        raise ValueError("generate: the prompt must have at least one token, got an empty one")
    torch.manual_seed(seed)
    clock = _clock_streamer(tokenizer)
    sampling = Sampling.of(model, temperature)
    ids = inputs.input_ids
    generate(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, streamer=clock, kv=kv or None)
    times = clock.times
    line = f"{len(times) - 1} tokens, the first after {times[1] - times[0]:.2f} s"
    return line if len(times) < 3 else f"{line}, then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"


def _loaded(path: Path, dtype: str, device: str) -> tuple[Any, Any]:
    chosen = parse_dtype(dtype)
    with Console(stderr=True).status(f"loading {path}"):
        return load_language_model(path, device or ("cuda" if torch.cuda.is_available() else "cpu"), chosen)


def _clock_streamer(tokenizer: Any) -> Any:
    """Makes a Transformers streamer that prints text as it comes; `times`: of the prompt, then of each token."""

    class Clock(library("transformers").TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Clock()
