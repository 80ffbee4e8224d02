"""Trains a language model at few bits by distillation: `python -m bench.distill --model FILE_OR_FOLDER --text FILE`.

The student's linears are quantized by SimQAT with learned steps and zero points; its teacher is the float model. It
starts from weights and steps of PTQ, or from the float weights (`--start float`), and is trained on windows of the
second half of the text, as the teacher answers there: labels are not used. Perplexity is that of the converted model on
the first tokens of the text, so no token is in both. A row is recorded at the start, and every `--every` steps, so that
a run that is cut leaves what it had. Where model and text come from is told in `bench.language`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.ptq import HEAD, first_tokens
from gs_algos import PTQ, Distill, SimQAT
from gs_algos.llm.calibrate import peak_memory
from gs_algos.llm.calibration_text import windows_of
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity

CONTEXT = 1024  # tokens of a window of perplexity and of PTQ's calibration, as in `bench.ptq`
SLOWER = 4  # rate of the weights over that of their learned steps
WARMUP = 0.05  # share of the steps in which the rate rises; it then falls like half a cosine


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("samples", "steps", "batch_size", "context", "every", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    if not args.text.is_file():
        print(f"bench.distill: --text must be a file, got {args.text}", file=sys.stderr)
        return 2
    text = {"text": args.text.name, "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest()[:16]}
    try:
        for row in measure(args):
            path = record.append({"model": args.model.name, **text, **row}, kind="distill", device="cpu")
            print(f"step {row['step']}: perplexity {row['perplexity']}, recorded in {path}", flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.distill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file or a Transformers folder")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--weight", default="int2@group:64:asym", help="scheme of the linears but the head")
    parser.add_argument(
        "--start", default="int2@group:64", metavar="SCHEME", help="that PTQ moves the weights to before; or float"
    )
    parser.add_argument(
        "--samples", type=int, default=16, help=f"windows of {CONTEXT} tokens that PTQ is calibrated on"
    )
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2, help="windows of a step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window of the training")
    parser.add_argument("--lr", type=float, default=3e-4, help="of AdamW, at its highest")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=64, help="steps between two rows")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that perplexity is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row at the start and every so many steps."""
    weight = args.weight if ":lsq" in args.weight else f"{args.weight}:mse:lsq"
    student = SimQAT(weight=weight, act=None, rules=HEAD)
    model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    words = args.text.read_text(encoding="utf-8")
    ids = first_tokens(tokenizer, words, args.tokens)
    needed = max(args.steps * args.batch_size * args.context, args.samples * CONTEXT)
    train = tokenizer(words[len(words) // 2 :], return_tensors="pt", verbose=False).input_ids[0, :needed]
    if len(train) < needed:
        raise ValueError(f"bench.distill: half of the text must hold {needed} tokens, got {len(train)}; lower --steps")
    about = {"weight": args.weight, "start": args.start, "of": args.steps, "context": args.context, "lr": args.lr}
    about |= {"batch_size": args.batch_size, "temperature": args.temperature, "seed": args.seed, "amp": args.amp}
    about["float"] = _value(model, ids)
    teacher = copy.deepcopy(model)
    calibration = windows_of(tokenizer, train[: args.samples * CONTEXT], CONTEXT)
    packed = None if args.start == "float" else _by_ptq(model, args.start, calibration)
    windows = train[: args.steps * args.batch_size * args.context].view(args.steps, args.batch_size, args.context)
    windows = windows[torch.randperm(args.steps, generator=torch.Generator().manual_seed(args.seed))]
    algo = Distill(student, teacher, logits=1.0, labels=0.0, temperature=args.temperature)
    model = algo.apply(model, windows[0])
    if packed is not None:
        algo.start_from(packed)
    learned = set(algo.learned_parameters())
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter not in learned], "lr": args.lr},
        {"params": list(learned), "lr": args.lr / SLOWER},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, args.steps))
    loss_fn = algo.loss(_no_labels)
    seconds, cpu = 0.0, 0.0
    losses: list[float] = []
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            row = {"step": step, "trained_tokens": step * windows[0].numel(), "seconds": round(seconds, 1)}
            row |= {"cpu_seconds": round(cpu, 1), "peak_bytes": peak_memory()}
            row |= {"loss": round(sum(losses) / len(losses), 4)} if losses else {}
            yield {**about, **row, "perplexity": _value(algo.convert(copy.deepcopy(model)), ids), "tokens": len(ids)}
            losses = []
        if step == args.steps:
            break
        started, cpu_started = time.perf_counter(), sum(os.times()[:4])
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            loss = loss_fn(model(windows[step], use_cache=False), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        algo.step()
        losses.append(float(loss.detach()))
        seconds, cpu = seconds + time.perf_counter() - started, cpu + sum(os.times()[:4]) - cpu_started
        print(f"step {step + 1} of {args.steps}: loss {losses[-1]:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)


def _by_ptq(model: nn.Module, scheme: str, windows: Sequence[Tensor]) -> nn.Module:
    """Returns the model as PTQ packs it; the one that was given stays as it is."""
    batches = [{"input_ids": window} for window in windows]
    algo = PTQ(weight=scheme, rules=HEAD)
    calibrated = algo.apply(copy.deepcopy(model), batches[0])
    algo.calibrate(calibrated, batches)
    return algo.convert(calibrated)


def _rate(step: int, steps: int) -> float:
    rise = max(1, round(WARMUP * steps))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _no_labels(output: Any, labels: None) -> Tensor:
    raise AssertionError("labels weigh 0")


def _value(model: nn.Module, ids: Tensor) -> float:
    return round(perplexity(model, ids, CONTEXT, progress=False).value, 4)


if __name__ == "__main__":
    raise SystemExit(main())
