#!/usr/bin/env bash
# GPTQ and AWQ checkpoints through GPTQModel and Transformers, on a CPU: ours loaded by them and theirs by us, bit for bit.
# Makes its own virtual environment in the folder given (3 GB; kept, and used again), or in a temporary one.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
cd "$work"

if [ ! -x venv/bin/python ]; then
  python3 -m venv venv
  venv/bin/pip install -q torch==2.13.0
  venv/bin/pip install -q gptqmodel==7.6.0 optimum==2.3.0 transformers==5.24.0 torch==2.13.0
fi
. venv/bin/activate
pip install -q --no-deps "$root"

# its pool of threads asks for two; compiling its kernels would take longer than all the rest
GPTQMODEL_CPU_WORKERS=2 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 python "$root/tests/interop/check_libraries.py"
