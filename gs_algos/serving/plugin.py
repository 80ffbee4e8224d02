"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations


def register() -> None:
    """Teaches vLLM our checkpoints, and offers our kernels for others'. Calling it again is fine."""
    from gs_algos.serving import vllm_kernel, vllm_quantization

    vllm_quantization.register()
    vllm_kernel.register()
