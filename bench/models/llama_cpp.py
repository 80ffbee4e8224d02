"""Measures llama.cpp on a GGUF file beside our own decoding, through the npm package node-llama-cpp.

Prompt, tokens and rounds are those of `bench.models.decode`; it runs where `npm install node-llama-cpp` was run, with
as many threads as PyTorch has. It takes the build of llama.cpp for this CPU.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.models.decode import PROMPT, ROUNDS, TOKENS

SCRIPT = """
import {getLlama} from "node-llama-cpp";
const {file, prompt, tokens, rounds, threads} = JSON.parse(process.argv[2]);
const llama = await getLlama({build: "never", gpu: false, maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, threads});
const sequence = context.getSequence(), ids = model.tokenize(prompt);
let firstMs = Infinity, perSecond = 0;
for (let round = 0; round <= rounds; ++round) {
  await sequence.clearHistory();
  const start = performance.now();
  let first = 0, count = 0;
  for await (const id of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    if (++count === 1) first = performance.now();
    if (count === tokens) break;
  }
  if (round === 0) continue;
  firstMs = Math.min(firstMs, first - start);
  perSecond = Math.max(perSecond, (count - 1) / (performance.now() - first) * 1e3);
}
console.log(JSON.stringify({prompt: ids.length, first_ms: firstMs, per_s: perSecond}));
process.exit(0);
"""


def llama_cpp_row(file: str, folder: Path) -> dict[str, Any]:
    """Returns the row of a GGUF file; an error is a row too.

    Args:
        folder: where node-llama-cpp is installed.
    """
    path = Path(file).resolve()
    row = {"network": path.name, "dtype": "float32", "batch": 1, "weights": "as stored, llama.cpp", "graph": False}
    given = {
        "file": str(path),
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
    }
    try:
        with tempfile.NamedTemporaryFile(
            "w", suffix=".mjs", dir=folder
        ) as script:  # packages are found from its folder
            script.write(SCRIPT)
            script.flush()
            command = ["node", script.name, json.dumps(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        measured = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        lines = (getattr(error, "stderr", "") or "").splitlines()
        said = next((line for line in lines if "Error" in line), error)
        return {**row, "error": f"{type(error).__name__}: {said}"[:300]}
    rates = {name: round(measured[name], 2) for name in ("per_s", "first_ms")}
    return {**row, "nbytes": path.stat().st_size, **rates, "prompt": measured["prompt"], "tokens": TOKENS}
