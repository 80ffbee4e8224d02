"""`python -m bench.models`: times whole networks, compressed against float, in one run on one device.

Rows are written as they are measured: time and memory of a training step, latency of one input and throughput of a
batch of the converted network. A row says what autograd keeps of a step, the bytes of the network, and the most that a
step or forward takes. `--decode MODEL` adds tokens per second of a language model, in bf16 and packed; `--network`
without a name leaves out the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.models.decode import RANDOM, decode_rows
from bench.models.llama_cpp import llama_cpp_row
from bench.models.measure import ALGORITHMS, measure
from bench.models.networks import NETWORKS

COLUMNS = "{:12} {:12} {:10} {:>5} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}  {}"
HEAD = ("network", "algorithm", "phase", "batch", "p20 ms", "p50 ms", "p80 ms", "vs float", "per s", "MB", "")


def line(row: dict[str, Any], base: float | None) -> str:
    network = (row["network"], row["algorithm"], row["phase"], row.get("batch", "-"))
    if "error" in row:
        return COLUMNS.format(*network, *["-"] * 6, f"failed: {row['error']}")
    times = tuple(f"{row[k]:.2f}" for k in ("ms_p20", "ms_p50", "ms_p80"))
    ratio = f"{row['ms_p50'] / base:.2f}x" if base else "-"
    sizes = [row[key] for key in ("peak_bytes", "saved_bytes", "nbytes") if key in row]
    return COLUMNS.format(*network, *times, ratio, row.get("per_s", "-"), f"{sizes[0] / 1e6:.1f}", "")


def decode_line(row: dict[str, Any]) -> str:
    model = f"{row['network']} {row['weights']}"
    if "error" in row:
        return f"{model}: failed: {row['error']}"
    how = "a graph a step" if row["graph"] else "no graph"
    return f"{model}, {how}: {row['per_s']} tokens/s, first after {row['first_ms']} ms, {row['nbytes'] / 1e6:.1f} MB"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--algorithm", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--quick", action="store_true", help="small inputs, batch 4: what a CPU can do in minutes")
    parser.add_argument("--batch", type=int, help="of training and throughput; default: by network, with --quick 4")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one number")
    parser.add_argument("--limit", type=float, metavar="S", help="start nothing new after so many seconds")
    models = f"language models: folders, GGUF files, {', '.join(RANDOM)}"
    parser.add_argument("--decode", nargs="+", default=[], metavar="MODEL", help=models)
    parser.add_argument("--onnx-runtime", action="store_true", help="time our exports in ONNX Runtime too")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where node-llama-cpp is: runs GGUF files too")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    chosen = parser.parse_args(argv)
    if chosen.batch is not None and chosen.batch < 1:
        parser.error(f"--batch must be >= 1, got {chosen.batch}")
    if chosen.onnx_runtime and chosen.device != "cpu":
        parser.error(f"--onnx-runtime is timed on a CPU, got --device {chosen.device}; use --device cpu")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch sees none; use --device cpu")
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = parse(argv)
    start, failed = time.monotonic(), False
    print(COLUMNS.format(*HEAD))
    for name in chosen.network:
        base: dict[str, float] = {}
        for algorithm in chosen.algorithm:
            if chosen.limit is not None and time.monotonic() - start > chosen.limit:
                print(f"--limit {chosen.limit:g} s reached before {name} {algorithm}; not timed")
                return 1
            for row in _rows(name, algorithm, chosen):
                record.append(row, "model", device=chosen.device, path=chosen.out)
                if algorithm == "float" and "ms_p50" in row:
                    base[row["phase"]] = row["ms_p50"]
                failed |= "error" in row
                print(line(row, base.get(row["phase"])), flush=True)
    for source in chosen.decode:
        for row in decode_rows(source, chosen.device, chosen.seconds):
            record.append(row, "decode", device=chosen.device, path=chosen.out)
            failed |= "error" in row
            print(decode_line(row), flush=True)
        if chosen.llama_cpp is not None and source.endswith(".gguf"):
            row = llama_cpp_row(source, chosen.llama_cpp)
            record.append(row, "decode", device=chosen.device, path=chosen.out)
            failed |= "error" in row
            print(decode_line(row), flush=True)
    return int(failed)


def _rows(name: str, algorithm: str, chosen: argparse.Namespace) -> Any:
    network = NETWORKS[name]
    common = {"network": name, "algorithm": algorithm, "quick": chosen.quick, "input": network.size(chosen.quick)}
    batch = chosen.batch or (4 if chosen.quick else network.batch)
    options = {"device": chosen.device, "batch": batch, "quick": chosen.quick, "seconds": chosen.seconds}
    options["onnx_runtime"] = chosen.onnx_runtime
    try:
        for row in measure(network, algorithm, **options):
            yield {**common, **row}
    except Exception as error:  # noqa: BLE001  Triton's own errors are of any type: each is a row
        yield {**common, "phase": "all", "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


if __name__ == "__main__":
    sys.exit(main())
