"""Registers golden-stick with vLLM, which calls this in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Registers our checkpoint format, and our kernels for other formats. May be called again."""
    from gs_algos.serving import vllm_kernel, vllm_quantization

    vllm_quantization.register()
    vllm_kernel.register()
