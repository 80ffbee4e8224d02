"""Calibrates a language model on a text and writes it as a packed folder."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gs_algos.core.arguments import as_device, as_path
from gs_algos.core.files import scratch_folder
from gs_algos.core.mapped_files import in_file
from gs_algos.core.plan import Plan
from gs_algos.llm.calibration_text import calibration_text
from gs_algos.llm.folder import read_folder, read_json, whole_folder
from gs_algos.llm.libraries import library
from gs_algos.llm.load import gguf_skeleton, is_gguf, load_language_model, refuse_dtype
from gs_algos.llm.perplexity import perplexity
from gs_algos.ptq.config import PTQConfig
from gs_algos.ptq.ptq import ENOUGH, PTQ
from gs_algos.ptq.report import PTQReport
from gs_algos.quant.packed.linear import TOKEN
from gs_algos.quant.scheme import Scheme
from gs_algos.search.mixed_bits import CHOICES, MixedBits, mixed_bits, parse_budget

WHO = "calibrate_language_model"
SAMPLES, CONTEXT = 128, 2048
MEASURED = 8192  # tokens of perplexity
EXAMPLE = 32  # tokens that show how the network is built
SENSITIVITY = 8192  # tokens that a budget is spent by
JOURNAL, WEIGHTS = ".journal", ".weights"  # behind the name of the target
FP32 = 4  # bytes


@dataclass(frozen=True)
class CalibrationResult:
    """Says what `calibrate_language_model` wrote.

    Args:
        plan: a row for each weight.
        report: of the calibration, layer by layer.
        text: what it was calibrated on.
        tokens: that entered the statistics.
        before, after: perplexity behind the calibration text; None if there was too little of it.
        seconds: in all.
        memory: bytes that the process held at most; 0 where the system does not tell.
        mixed: the schemes that a budget chose; None without one.
    """

    folder: Path
    plan: Plan
    report: PTQReport
    text: str
    tokens: int
    before: float | None
    after: float | None
    seconds: float
    memory: int
    mixed: MixedBits | None
    notes: tuple[str, ...] = ()


def calibrate_language_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: PTQConfig | None = None,
    *,
    budget: str | None = None,
    choices: Sequence[str | Scheme] = CHOICES,
    calibration: str | os.PathLike[str] | None = None,
    samples: int = SAMPLES,
    context: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    offload: bool | None = None,
    resume: bool = False,
) -> CalibrationResult:
    """Quantizes a Transformers folder or a GGUF file by `PTQ` into the new packed folder `target`.

    Calibration computes in fp32. What is done is kept in `<target>.journal`, which is deleted at the end: after a
    run that was killed, `resume` goes on there and writes the same bytes.

    Args:
        config: of PTQ; None for its defaults.
        budget: `4.5 bits`, `80 MB` or `30% bytes`: `mixed_bits` chooses among `choices` for every layer that no rule of
            the config is for. It takes a backward pass: of one window, all activations are in memory.
        calibration: a UTF-8 text, or JSON lines with a `text` each (.jsonl); None for a built-in text.
        samples: windows of the text that enter the statistics, at most.
        context: tokens of a window; None for 2048, or as many positions as the model has.
        dtype: of what stays float; None for that of the source.
        device: where it is calibrated.
        offload: True keeps the float weights, 4 bytes each, and the activations of calibration in files beside the
            target that are mapped into memory, so that a model may be larger than memory; None does so where the
            weights take more than half of the memory that is free. A GGUF file is dequantized in memory first.
        resume: go on with the journal of a run that was stopped.

    Raises:
        ValueError: if the source is no whole float model, the target is not empty, there is a journal and `resume` is
            False, the text cannot be read or is too short, or as `PTQ`.
    """
    started = time.perf_counter()
    path, out = as_path(source, f"{WHO}: the source"), as_path(target, f"{WHO}: the target")
    as_device(device, WHO)
    refuse_dtype(dtype, WHO)
    journal = out.parent / f"{out.name}{JOURNAL}"
    if journal.exists() and not resume:
        raise ValueError(f"{WHO}: {journal} is of a run that was stopped; go on with --resume, or delete it")
    config = config or PTQConfig()
    if config.act not in (None, TOKEN):
        raise ValueError(
            f"{WHO}: act must be None or {TOKEN!r}, got {str(config.act)!r}; PTQ itself takes it, on any network"
        )
    if budget is not None:
        parse_budget(budget)
    if offload and torch.device(device).type != "cpu":
        raise ValueError(f"{WHO}: offload keeps weights for the CPU in files, got device={str(device)!r}")
    with whole_folder(out, WHO) as folder, scratch_folder(out.with_name(f"{out.name}{WEIGHTS}")) as files:
        model: Any
        needed = _float_bytes(path)
        if offload is None:
            offload = torch.device(device).type == "cpu" and needed > free_memory() / 2
        # what is read as it is stays in its file until it is needed
        read_as = None if offload and not is_gguf(path) else torch.float32
        model, tokenizer = load_language_model(path, device, read_as)
        _refuse_quantized(model, path)
        if offload:
            _offload(model, files)
            config = replace(config, budget=0)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context = min(CONTEXT, longest or CONTEXT) if context is None else context
        if longest is not None and context > longest:
            raise ValueError(f"{WHO}: --context must be at most the {longest} positions of the model, got {context}")
        text = calibration_text(
            None if calibration is None else Path(calibration), tokenizer, samples, context, MEASURED, WHO
        )
        batches = [{"input_ids": window.to(device)} for window in text.windows]
        measured = min(1024, context)
        before = _perplexity(model, text.rest, measured, None)
        mixed = None
        if budget is not None:
            few = batches[: max(1, SENSITIVITY // context)]
            ruled = [rule for rule in config.rules if rule[1] is None or "weight" in rule[1]]
            mixed = mixed_bits(model, few, budget, choices, embeddings=config.embeddings, rules=ruled)
            config = replace(config, rules=(*config.rules, *mixed.rules))
        algo = PTQ(config)
        example = {"input_ids": batches[0]["input_ids"][:, :EXAMPLE]}  # activations of all modules are held for it
        plan = algo.plan(model, example)
        model = algo.apply(model, example)
        algo.calibrate(model, batches, journal=journal)
        assert algo.report is not None
        after = _perplexity(model, text.rest, measured, config.kv)
        model = algo.convert(model)
        model.to(dtype or _dtype_of(path))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.rmtree(journal, ignore_errors=True)
    notes = list(plan.notes)
    if calibration is None:
        notes.append(
            f"calibrated on {text.source}, since no text was given; --calibration takes one like what it reads"
        )
    if offload:
        notes.append(f"{needed:,} bytes of float weights were in files, not in memory: --no-offload is faster")
    if text.tokens < ENOUGH:
        notes.append(f"{text.tokens:,} tokens are few: with {ENOUGH:,} and more the codes fit other text, too")
    seconds = time.perf_counter() - started
    return CalibrationResult(
        out, plan, algo.report, text.source, text.tokens, before, after, seconds, peak_memory(), mixed, tuple(notes)
    )


def _perplexity(model: Any, ids: torch.Tensor, context: int, kv: str | None) -> float | None:
    return perplexity(model, ids, context, progress=False, kv=kv).value if len(ids) >= context else None


def _float_bytes(path: Path) -> int:
    """Returns the bytes of a model's tensors in fp32."""
    if is_gguf(path):
        return sum(FP32 * parameter.numel() for parameter in gguf_skeleton(path)[0].parameters())
    return sum(FP32 * math.prod(shape) for _, shape in read_folder(path, WHO).headers(WHO).values())


def _offload(model: torch.nn.Module, folder: Path) -> None:
    """Moves the parameters of a model to fp32 files that are mapped into memory."""
    for number, parameter in enumerate(model.parameters()):
        parameter.data = in_file(parameter.data.float(), folder / f"{number}.bin")
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


def _refuse_quantized(model: Any, path: Path) -> None:
    if getattr(model.config, "quantization_config", None) is not None and not is_gguf(path):
        raise ValueError(f"{WHO}: {path} must be a float model, got one that is quantized; give the float one")


def _dtype_of(path: Path) -> torch.dtype:
    """Returns the dtype that a folder says its model has; fp32 for a GGUF file."""
    if is_gguf(path):
        return torch.float32
    config = read_json(path / "config.json", WHO)
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def free_memory() -> int:
    """Returns the bytes of memory that can be had without swapping: what is free, and what caches of files take."""
    return int(library("psutil").virtual_memory().available)


def peak_memory() -> int:
    """Returns the bytes that this process held at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
