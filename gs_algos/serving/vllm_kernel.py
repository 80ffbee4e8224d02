"""Adds our kernel to vLLM's list for checkpoints of compressed-tensors, GPTQ and AWQ, at 2, 4 and 8 bits.

vLLM takes the first kernel of the list that can multiply a layer, and ours is the last. The environment variable
`VLLM_DISABLED_KERNELS` takes kernels out: with `CPUWNA16LinearKernel` in it a CPU uses ours, with
`GoldenStickLinearKernel` ours is switched off.
"""

from __future__ import annotations

import os
import platform
from functools import cache

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat
from gs_algos.serving.engine_parameters import from_words, get_weight, set_weight
from gs_algos.serving.engine_product import engine_qmatmul
from gs_kernels import PackedWeight
from gs_kernels.pack.checks import FLOATS

CAPABILITY = 80  # the oldest GPUs that our kernels are compiled for
SYMMETRIC = {scalar_types.uint2b2: 2, scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}
ASYMMETRIC = {scalar_types.uint2: 2, scalar_types.uint4: 4, scalar_types.uint8: 8}
OF_AVX512 = "CPUWNA16LinearKernel"  # of vLLM; its build for AVX2 lists it, without the code that it calls
PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA, PlatformEnum.ROCM)


class GoldenStickLinearKernel(MPLinearKernel):
    """Multiplies by the weight of a linear layer, which vLLM loads as int32 words."""

    @classmethod
    def get_min_capability(cls) -> int:
        return CAPABILITY

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Says whether our kernel can multiply this layer, and if not why."""
        reason = _refusal(c)
        return reason is None, reason

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replaces the int32 words that were loaded by a packed weight."""
        weight = self._loaded(layer)
        self.names = dict(zip(WEIGHT_TENSORS, (self.w_q_name, self.w_s_name, self.w_zp_name), strict=False))
        self.format = PackedFormat.of(weight)
        self.layout = set_weight(layer, self.names, weight, self.w_q_name)
        if self.w_zp_name and self.format.zero is not None:
            setattr(layer, self.w_zp_name, None)  # symmetric, or the same everywhere

    def _loaded(self, layer: nn.Module) -> PackedWeight:
        c = self.config
        words, scale, zeros = (_rows_first(p) for p in self._get_weight_params(layer))
        columns, rows = c.partition_weight_shape
        assert words is not None and scale is not None
        return from_words(
            words,
            scale,
            zeros if c.zero_points else None,
            bits=c.weight_type.size_bits,
            parts=list(getattr(layer, "output_partition_sizes", [rows])),
            columns=columns,
            group_size=columns if c.group_size == -1 else c.group_size,
        )

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return engine_qmatmul(x, get_weight(layer, self.names, self.format, self.layout), bias)


def _refusal(c: MPLinearLayerConfig) -> str | None:
    """Says why our kernel cannot multiply a layer; None if it can."""
    bits = (ASYMMETRIC if c.zero_points else SYMMETRIC).get(c.weight_type)
    columns, rows = c.partition_weight_shape
    if bits is None:
        return f"weights must be uint2, uint4 or uint8 with zero points or biased without, got {c.weight_type}"
    if c.act_type not in FLOATS or c.out_type not in (None, c.act_type):
        return f"activations must be fp32, fp16 or bf16 and stay so, got {c.act_type} to {c.out_type}"
    if c.group_size != -1 and columns % c.group_size:
        return f"K must be a multiple of group_size {c.group_size}, got {columns}"
    if columns != c.full_weight_shape[0] and columns * bits % 32:
        return f"K of a part must be a multiple of {32 // bits}, got {columns}"
    if c.zero_points and rows * bits % 32:
        return f"N must be a multiple of {32 // bits} with zero points, got {rows}"
    return None


def _rows_first(parameter: Tensor | None) -> torch.Tensor | None:
    """Returns a parameter with rows first, as compressed-tensors has it: GPTQ's and AWQ's are transposed."""
    if parameter is None:
        return None
    return parameter.data.t() if getattr(parameter, "output_dim", 0) == 1 else parameter.data


@cache  # vLLM calls plugins again, and its list takes a class twice
def register() -> None:
    for one in PLATFORMS:
        register_linear_kernel(GoldenStickLinearKernel, one, "mp")
    if current_platform.is_cpu() and platform.machine() == "x86_64" and not has_avx512():
        disabled = [name for name in envs.VLLM_DISABLED_KERNELS if name]
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join(dict.fromkeys((*disabled, OF_AVX512)))
        init_logger(__name__).info("%s needs AVX-512, which this CPU lacks; ours stands in", OF_AVX512)


def has_avx512() -> bool:
    """Says what vLLM asks, too, when it takes its build for this CPU."""
    return bool(torch.cpu.get_capabilities().get("avx512_f"))
