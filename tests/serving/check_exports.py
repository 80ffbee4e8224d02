"""What vLLM makes of our exports on a CPU: tokens of tiny random models are those of the packed folder, or an error.

`python check_exports.py FOLDER` prints a line for each format and kind of weight. compressed-tensors go through our
kernel in fp32, where tokens are equal. GPTQ and AWQ go in 16 bits, which vLLM asks of them, through vLLM's own kernel
where the CPU has AVX-512: log probabilities are near until rounding chooses another token. Exits with 1 if something
differs, or is refused with other words.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from check_experts import PROMPTS, TOKENS, want
from check_kernel import THEIRS

from gs_algos.llm.interchange import export_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.serving import vllm_plugin

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# vLLM takes a gpt-oss in bf16 alone, GPTQ and AWQ in 16 bits
DTYPES = {
    "compressed-tensors": torch.float32, "gptq": torch.float16, "awq": torch.float16, "mxfp4": torch.bfloat16
}  # fmt: skip
# of log probabilities, before the first other token
CLOSE = {torch.float32: 1e-3, torch.float16: 0.05}


@dataclass(frozen=True)
class Export:
    """A packed folder and the format it is exported to. error: words of what vLLM raises on a CPU; "" if it loads."""

    to: str
    scheme: str
    error: str = ""
    gpt_oss: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.to]


EXPORTS = (
    Export("gptq", "int4@group:64"),
    Export("gptq", "int4@group:64:asym", error="Unsupported quantization config: bits=4, sym=False"),
    Export("gptq", "int8@channel", error="Marlin does not support weight_bits = uint8b128"),
    Export("gptq", "int2@group:64", error="Unsupported quantization config: bits=2"),
    Export("awq", "int4@group:64"),
    Export("awq", "int4@group:64:asym"),
    Export("compressed-tensors", "int4@group:64"),
    Export("compressed-tensors", "int4@group:64:asym"),
    Export("compressed-tensors", "int8@channel"),
    Export("compressed-tensors", "int2@group:64"),
    Export("compressed-tensors", "nvfp4", error="NVFP4 kernel MarlinNvFp4LinearKernel is not supported"),
    Export("compressed-tensors", "mxfp4", error="Failed to find a kernel that can implement the MXFP4 linear layer"),
    Export("mxfp4", "mxfp4", error="No MXFP4 MoE backend supports the deployment", gpt_oss=True),
)


def gpt_oss() -> Any:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | more)).eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


def exported(case: Export, folder: Path) -> tuple[Path, Path]:
    """Returns the packed folder and its export."""
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    (gpt_oss() if case.gpt_oss else llama()).save_pretrained(folder / "float")
    quantize_checkpoint(folder / "float", folder / "packed", case.scheme, progress=False)
    export_language_model(folder / "packed", folder / "out", case.to)
    return folder / "packed", folder / "out"


def engine(folder: Path, dtype: torch.dtype) -> list[tuple[list[int], list[float], str]]:
    """Returns of each prompt the tokens and their log probabilities, and the class that multiplies a layer."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), dtype=str(dtype).removeprefix("torch."), max_model_len=128, max_num_seqs=4, enforce_eager=True,
        skip_tokenizer_init=True,
    )  # fmt: skip
    (kernel,) = set(llm.apply_model(_kernel))
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    made = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    return [
        (list(o.token_ids), [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)], kernel) for o in made
    ]


def _kernel(model: Any) -> str:
    layer = next(m for name, m in model.named_modules() if name.endswith(("experts", "qkv_proj")))
    method = getattr(layer, "scheme", None) or layer.quant_method
    return type(getattr(method, "kernel", method)).__name__


def check(case: Export, folder: Path) -> bool:
    """Prints what vLLM makes of an export, and returns whether it is what is expected."""
    name = f"{case.to}, {case.scheme}"
    packed, out = exported(case, folder)
    vllm_plugin.register()  # which on some CPUs takes out what does not run there
    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "")
    if case.dtype == torch.float32:
        os.environ["VLLM_DISABLED_KERNELS"] = THEIRS
    try:
        got = engine(out, case.dtype)
    except Exception as error:  # noqa: BLE001  vLLM's own have no common class
        expected = bool(case.error) and case.error in str(error)
        print(f"{name}: {'refused' if expected else 'REFUSED'}, {type(error).__name__}: {error!s:.300}", flush=True)
        return expected
    finally:
        os.environ["VLLM_DISABLED_KERNELS"] = disabled
    if case.error:
        print(f"{name}: LOADED, expected: {case.error}", flush=True)
        return False
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=case.dtype).eval()
    equal = True
    for prompt, (tokens, logps, kernel) in zip(PROMPTS, got, strict=True):
        expected_tokens, ours = want(model, prompt)
        pairs = zip(tokens, expected_tokens, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), TOKENS)
        off = max((abs(a - b) for a, b in zip(logps[:same], ours[:same], strict=True)), default=0.0)
        right = off <= CLOSE[case.dtype] and (same == TOKENS or (case.dtype != torch.float32 and same > 0))
        equal = equal and right
        words = "equal" if right else "DIFFERENT"
        print(f"{name}: {words}, {same} of {TOKENS} tokens by {kernel}, log p within {off:.1e}", flush=True)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    wrong = sum(not check(case, folder / str(i)) for i, case in enumerate(EXPORTS))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
