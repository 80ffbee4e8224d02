"""Writes the example pages of the docs and checks their advice: `python -m bench.reports --network resnet20`.

A network is quantized without training, `gs_algos.report` writes its page, and the network is quantized again with the
rules of the page's first advice: a row holds the error of the outputs and the divergence that the advice predicted, and
what the packed network gives on samples that the report has not seen. Networks: `resnet20` on Fashion-MNIST, trained
first; `efficientnet-lite0` on photographs (packages: see `bench.photographs`); `smollm2`, a GGUF file (see
`bench.language`) on a text.
"""

from __future__ import annotations

import argparse
import ast
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gs_algos
from bench import record
from gs_algos.analysis.divergence import Trials
from gs_algos.analysis.probe import Probe

SAMPLES = 64
TOLERANCE = 0.05


@dataclass(frozen=True)
class Subject:
    """Holds a float network, how it is quantized (with rules), batches for the report, and others for the check."""

    net: nn.Module
    quantize: Callable[[Sequence[Any]], nn.Module]
    seen: list[Any]
    others: list[Any]
    setting: str
    samples: int = SAMPLES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reports", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=SUBJECTS, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/reports"), help="folder of the page")
    parser.add_argument("--data", default="fashion-mnist", help="of resnet20, as golden-stick demo --data")
    parser.add_argument("--model", type=Path, help="of smollm2: a GGUF file or a Transformers folder")
    parser.add_argument("--text", type=Path, help="of smollm2: a UTF-8 text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        subject = SUBJECTS[args.network](args)
    except (ImportError, ValueError, OSError) as error:
        print(f"bench.reports: needs what its first lines name, got: {error}", file=sys.stderr)
        return 2
    page = args.out / f"{args.network}.html"
    packed = subject.quantize([])
    started = time.perf_counter()
    report = gs_algos.report(
        subject.net,
        packed,
        subject.seen,
        page,
        samples=subject.samples,
        tolerance=TOLERANCE,
        title=f"{args.network}, {subject.setting}",
    )
    row: dict[str, Any] = {
        "network": args.network,
        "setting": subject.setting,
        "seconds": round(time.perf_counter() - started, 1),
        "page_bytes": page.stat().st_size,
    }
    raised = next((one for one in report.advice if one.measured is not None), None)
    if raised is not None and raised.predicted is not None:
        rules = ast.literal_eval(raised.rules.removeprefix("rules="))
        trials = Trials(Probe(subject.net, "bench.reports"), subject.others)
        before, after = trials.compared(packed), trials.compared(subject.quantize(rules))
        row |= {
            "error": round(before.error, 4),
            "predicted_error": round(raised.predicted.error, 4),
            "measured_error": round(after.error, 4),
            "divergence": round(before.divergence, 5),
            "predicted_divergence": round(raised.predicted.divergence, 5),
            "measured_divergence": round(after.divergence, 5),
            "samples": after.samples,
            "advice": raised.text,
        }
    record.append(row, kind="report", device="cpu")
    print(row)
    return 0


def resnet20(args: argparse.Namespace) -> Subject:
    from bench.accuracy import first_images
    from bench.sensitivity import trained
    from gs_algos.demo.data import load_data

    data = first_images(load_data(args.data), 12_000)
    net = trained("resnet20", data, 3, 0)
    pairs = list(zip(data.test_x.split(64), data.test_y.split(64), strict=True))
    batches = [(data.normalize(x), y) for x, y in pairs]

    def quantize(rules: Sequence[Any]) -> nn.Module:
        algo = gs_algos.SimQAT(weight="int3@channel", act="int8@tensor:ema", rules=rules)
        new = algo.apply(copy.deepcopy(net), batches[0][0])
        algo.calibrate(new, [data.normalize(x) for x in data.train_x[:512].split(64)])
        return algo.convert(new.eval(), batches[0][0])

    return Subject(net, quantize, batches[:32], [x for x, _ in batches[-8:]], "int3@channel, int8@tensor")


def efficientnet(args: argparse.Namespace) -> Subject:
    from bench.photographs import network, views

    net, x = network(), views()

    def quantize(rules: Sequence[Any]) -> nn.Module:
        algo = gs_algos.SimQAT(weight="int4@channel:mse", act=None, rules=rules)
        return algo.convert(algo.apply(copy.deepcopy(net), x[:2]).eval(), x[:2])

    return Subject(net, quantize, list(x[:12].split(6)), [x[12:]], "int4@channel:mse", 6)


def smollm2(args: argparse.Namespace) -> Subject:
    from gs_algos.llm.load import load_language_model

    if args.model is None or args.text is None:
        raise ValueError("--model and --text of smollm2")
    net, tokenizer = load_language_model(args.model, dtype=torch.float32)
    words = args.text.read_text(encoding="utf-8")[:100_000]
    ids: Tensor = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0, : 12 * 512]
    windows = [{"input_ids": window[None]} for window in ids.split(512)]

    def quantize(rules: Sequence[Any]) -> nn.Module:
        kept = [("lm_head", None)]
        chosen = [(pattern, options["weight"]) for pattern, options in rules]
        return gs_algos.quantize_weights(copy.deepcopy(net), "int4@group:64", rules=[*kept, *chosen], progress=False)

    return Subject(net, quantize, windows[:8], windows[8:], "int4@group:64")


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "resnet20": resnet20,
    "efficientnet-lite0": efficientnet,
    "smollm2": smollm2,
}


if __name__ == "__main__":
    raise SystemExit(main())
