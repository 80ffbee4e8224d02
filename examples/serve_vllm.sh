#!/usr/bin/env bash
# Packs a language model and serves it with vLLM, which finds golden-stick by its plug-in: nothing is to be imported.
#
#   pip install 'golden-stick-triton[cli,hf]' vllm
#   ./serve_vllm.sh SOURCE TARGET [options of vLLM, such as --port 8001]
#
# SOURCE is a Transformers folder or a GGUF file. Ask it then, from another terminal:
#
#   curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
#     -d '{"model": "TARGET", "prompt": "In the beginning", "max_tokens": 16}'
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
source=$1 target=$2
shift 2

# 4 bits a weight, a scale for every 64; one tensor in memory at a time
[ -d "$target" ] || golden-stick quantize "$source" "$target" --weights int4@group:64 --embeddings int8@group:64

# what is in the folder, from its headers alone
golden-stick info "$target"

# compares the hashes of every file, prints the vllm command, and becomes it
exec golden-stick serve "$target" "$@"
