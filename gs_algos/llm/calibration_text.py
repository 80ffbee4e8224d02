"""Reads the text that a language model is calibrated on, and cuts it into windows of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILT_IN = "the Python language reference"  # of the pydoc of this Python: English prose that is everywhere
FIELDS = ("text", "content", "prompt")  # of an object in JSON lines
CHARACTERS = 8  # a token has at most, on average: what is not tokenized is not waited for


@dataclass(frozen=True)
class CalibrationText:
    """Holds windows of tokens.

    Args:
        windows: as those of `windows_of`, for the statistics.
        rest: `[T]` int64, tokens behind them, on which perplexity is measured, with the one that begins a text before
            them where the tokenizer puts it; may be empty.
        source: what was read, for messages.
    """

    windows: list[Tensor]
    rest: Tensor
    source: str

    @property
    def tokens(self) -> int:
        return sum(window.numel() for window in self.windows)


def read_text(path: Path | None, who: str) -> tuple[str, str]:
    """Returns (text, what it is) of a UTF-8 file, of JSON lines if it ends in .jsonl; the built-in text for None.

    Raises:
        ValueError: if it is no file, no UTF-8, or a line of JSON has no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), BUILT_IN
    if not path.is_file():
        raise ValueError(f"{who}: the calibration text must be a file, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{who}: {path} must be UTF-8 text, got {error}") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_of_line(path, i, line, who) for i, line in enumerate(text.split("\n"), 1) if line.strip())
    return text, str(path)


def _of_line(path: Path, number: int, line: str, who: str) -> str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} must have a JSON object in each line, got {error} in line {number}") from error
    found: Any = data if isinstance(data, str) else None
    if isinstance(data, dict):
        found = next((data[key] for key in FIELDS if isinstance(data.get(key), str)), None)
    if found is None:
        fields = ", ".join(FIELDS)
        raise ValueError(f"{who}: a line of {path} must have one of {fields}, got {line!r:.60} in line {number}")
    return found


def windows_of(tokenizer: Any, ids: Tensor, context: int) -> list[Tensor]:
    """Cuts the tokens of a text into windows `[1, context]` int64; what does not fill a last one is left out.

    Where the tokenizer put the token that begins a text before it, as those of Gemma and Llama do, every window begins
    with that token, since every text does that the model is given later: the first token of a text draws the largest
    activations. The rest of each window are the tokens behind those of the window before.

    Args:
        ids: `[T]` int64, as the tokenizer gives them.
        context: tokens of a window, >= 2.
    """
    first, text = _parts(tokenizer, ids)
    size = context - len(first)
    windows = text[: len(text) // size * size].to(torch.int64).split(size)
    return [torch.cat((first, window))[None] for window in windows if len(window)]


def _parts(tokenizer: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the tokens of a text into the one that begins it, if the tokenizer put it there, and the others."""
    count = int(len(ids) > 0 and int(ids[0]) == getattr(tokenizer, "bos_token_id", None))
    return ids[:count].to(torch.int64), ids[count:]


def calibration_text(
    path: Path | None, tokenizer: Any, samples: int, context: int, measured: int, who: str
) -> CalibrationText:
    """Reads a text and cuts it into windows; what follows them is measured.

    Args:
        samples: windows at most.
        context: tokens of each.
        measured: tokens at most for perplexity, behind the windows.

    Raises:
        ValueError: if the text cannot be read, or fills no window.
    """
    for name, value, least in (("samples", samples, 1), ("context", context, 2)):
        if value < least:
            raise ValueError(f"{who}: --{name} must be at least {least}, got {value}")
    text, source = read_text(path, who)
    wanted = samples * context + measured
    ids = tokenizer(text[: wanted * CHARACTERS], return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < context:
        raise ValueError(
            f"{who}: the calibration text must fill a window of {context} tokens, got {len(ids)} in {source}; "
            "give a longer text or a smaller --context"
        )
    first, body = _parts(tokenizer, ids)
    size = context - len(first)
    # a text that is too short for both gives a tenth to the measurement
    left = min(measured, max(len(body) - samples * size, len(body) // 10))
    count = min(samples, max(1, (len(body) - left) // size))
    windows = windows_of(tokenizer, ids[: len(first) + count * size], context)
    rest = body[count * size :][: measured - len(first)].to(torch.int64)
    if len(rest):  # perplexity looks for what begins a text there
        rest = torch.cat((first, rest))
    return CalibrationText(windows, rest, source)
