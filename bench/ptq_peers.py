"""Measures other libraries' PTQ as `bench.ptq` measures ours: `python -m bench.ptq_peers --peer hqq --model FOLDER`.

Runs in an environment that holds torch, transformers and the library, with the repository on PYTHONPATH: the libraries
need versions of each other that no one environment has. A row per scheme: the library's own call quantizes the float32
model, on the windows that `bench.ptq` calibrates on, and the network that it gives back is held to the float model on
the same tokens. Time and CPU time (user and system, children too) are of that call. Every row is a process of its own.
`--steps` is of the libraries that tune; a row says how many were taken. `--model` is a Transformers folder of floats; a
GGUF file becomes one if a new model of its config takes the state of what `load_language_model` reads, and is saved.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.ptq import calibration_windows, first_tokens, parsed
from bench.tables.language import WEIGHTS
from gs_algos.llm.calibrate import peak_memory
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.quant.scheme import Scheme
from gs_kernels.formats import PerGroup

FLOAT = "float"


@dataclass(frozen=True)
class Job:
    """Holds what a library is told: the model and where it lies, windows of tokens, the grid, the steps."""

    folder: Path
    model: Any
    tokenizer: Any
    windows: Sequence[Tensor]
    bits: int
    group: int | None  # None: one scale per output channel
    steps: int


@dataclass(frozen=True)
class Peer:
    """Says how a library is called.

    module: what it is imported as; method: how its row is named; run: returns the quantized network; takes: options of
    this command that its result depends on.
    """

    module: str
    method: str
    run: Callable[[Job], Any]
    takes: tuple[str, ...] = ("samples",)


def _llm_compressor(modifiers: Callable[[dict[str, Any]], list[Any]]) -> Callable[[Job], Any]:
    def run(job: Job) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from torch.utils.data import DataLoader

        sharing = {"strategy": "channel"} if job.group is None else {"strategy": "group", "group_size": job.group}
        weights = QuantizationArgs(num_bits=job.bits, type="int", symmetric=True, **sharing)
        scheme = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
        data: Any = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in job.windows]
        return oneshot(
            model=job.model,
            recipe=modifiers({"config_groups": scheme, "ignore": ["lm_head"]}),
            dataset=DataLoader(data, batch_size=1),
            pipeline="sequential",
            num_calibration_samples=len(data),
            max_seq_length=len(data[0]["input_ids"]),
        )

    return run


def _gptq_modifier(options: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(**options)]


def _awq_modifiers(options: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(**options)]


def _auto_round(job: Job) -> Any:
    from auto_round import AutoRound

    grid = {"bits": job.bits, "group_size": job.group or -1, "sym": True}
    windows = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in job.windows]
    size = {"nsamples": len(windows), "seqlen": len(job.windows[0]), "iters": job.steps}
    float32 = {"amp": False, "device_map": "cpu", "enable_torch_compile": False}
    return AutoRound(job.model, tokenizer=job.tokenizer, dataset=windows, **grid, **size, **float32).quantize()[0]


def _hqq(job: Job) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
    AutoHQQHFModel.quantize_model(job.model, config, compute_dtype=torch.float32, device="cpu")
    return job.model


def _gptqmodel(job: Job) -> Any:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it chooses 1, and then refuses that
    grid = {"bits": job.bits, "group_size": job.group or -1, "sym": True}
    config = QuantizeConfig(**grid, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(job.folder), config, dtype=torch.float32)
    windows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in job.windows]
    model.quantize(windows, batch_size=1, backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as folder:  # what it packed multiplies rightly once it is loaded again
        model.save(folder)
        loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    for name, layer in loaded.named_modules():  # float16 alone is allowed there, so its weights go to the float32 model
        if hasattr(layer, "dequantize_weight"):
            job.model.get_submodule(name).weight.data = layer.dequantize_weight().T.float().contiguous()
    return job.model


PEERS = {
    "llmcompressor-gptq": Peer("llmcompressor", "gptq", _llm_compressor(_gptq_modifier)),
    "llmcompressor-awq": Peer("llmcompressor", "awq", _llm_compressor(_awq_modifiers)),
    "auto-round": Peer("auto_round", "signround", _auto_round, ("samples", "steps")),
    "hqq": Peer("hqq", "hqq, asymmetric", _hqq, ()),
    "gptqmodel": Peer("gptqmodel", "gptq", _gptqmodel),
}


def main(argv: list[str] | None = None) -> int:
    args = parsed(_parser(), argv)
    torch.set_num_threads(args.threads)
    if args.task:
        result = measure(args)
        args.result.write_text(json.dumps(result))
        return 0
    try:
        peer = chosen(args.peer)
        if not args.text.is_file():
            raise ValueError(f"--text must be a file, got {args.text}")
        if not (args.model / "config.json").is_file():
            raise ValueError(f"--model must be a Transformers folder, got {args.model}")
        for weight in args.weights:
            Scheme.parse(weight, "weight")
    except ValueError as error:
        print(f"bench.ptq_peers: {error}", file=sys.stderr)
        return 2
    source = _own_process(args, FLOAT)["perplexity"]
    text = {"text": args.text.name, "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest()[:16]}
    about = {"provider": peer.module, "version": version(peer.module), "dtype": "float32"}
    for weight in args.weights:
        row = {"model": args.model.name, "setting": f"{weight} {peer.method}", "weight": weight, "method": peer.method}
        row |= {**about, **text, **_own_process(args, weight)}
        row["perplexity_change"] = round(row["perplexity"] / source - 1, 6)
        record.append(row, kind="ptq", device="cpu")
        print(row, flush=True)
    return 0


def chosen(name: str) -> Peer:
    """Returns the library of that name.

    Raises:
        ValueError: if there is none, or it is not installed here.
    """
    if name not in PEERS:
        raise ValueError(f"--peer must be one of {', '.join(PEERS)}, got {name!r}")
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        raise ValueError(f"--peer {name} needs the package {peer.module}, which is not installed in this environment")
    return peer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ptq_peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", required=True, help=f"one of {', '.join(PEERS)}")
    parser.add_argument("--model", type=Path, required=True, help="a Transformers folder of floats")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), help=f"schemes; default: {', '.join(WEIGHTS)}")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that perplexity is measured on")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16, help="windows that are calibrated on")
    parser.add_argument("--window", type=int, help="tokens of a window that is calibrated on; default: --context")
    parser.add_argument("--steps", type=int, default=200, help="of auto-round, a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def _own_process(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Measures one row in a process whose peak memory is then that row's; what the library prints goes to stderr.

    The process runs in a folder that goes with it: libraries write logs where they are.
    """
    names = ("peer", "tokens", "context", "samples", "window", "steps", "threads")
    options = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    options += ["--model", str(args.model.resolve()), "--text", str(args.text.resolve())]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, "-m", "bench.ptq_peers", *options, "--task", task, "--result", str(result)]
        done = subprocess.run(command, stdout=sys.stderr, cwd=folder, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"bench.ptq_peers: {args.peer} failed at {task}, see above")
        return json.loads(result.read_text())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the float model, or quantizes it by one scheme and measures that."""
    model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    words = args.text.read_text(encoding="utf-8")
    row: dict[str, Any] = {"context": args.context}
    if args.task != FLOAT:
        windows = calibration_windows(tokenizer, words, args.samples, args.window).unbind()
        if args.window != args.context:
            row["window"] = args.window
        scheme = Scheme.parse(args.task, "weight")
        group = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else None
        peer = PEERS[args.peer]
        row |= {name: getattr(args, name) for name in peer.takes}
        importlib.import_module(peer.module)
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        model = peer.run(Job(args.model, model, tokenizer, windows, scheme.format.bits, group, args.steps))
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["cpu_seconds"] = round(sum(os.times()[:4]) - cpu, 1)
        row["peak_bytes"] = peak_memory()
    torch.set_num_threads(args.threads)  # a library may have set another number
    result = perplexity(model, first_tokens(tokenizer, words, args.tokens), args.context, progress=False)
    return {**row, "perplexity": round(result.value, 4), "tokens": result.tokens}


if __name__ == "__main__":
    raise SystemExit(main())
