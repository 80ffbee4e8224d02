"""What vLLM gives our kernel of other libraries' layers: every width, grouping and grid, and none that it cannot run.

Run by check_vllm.py. An engine start would show one of these combinations; here vLLM's own choice and parameter classes
show them all.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.scalar_type import scalar_types

from gs_algos.serving import vllm_kernel, vllm_plugin
from gs_kernels import dequantize_packed, pack_weight
from gs_kernels.pack.formats.compressed_tensors import to_compressed_tensors

OURS, THEIRS = "GoldenStickLinearKernel", "CPUWNA16LinearKernel"
N, K, GROUP = 96, 256, 64


def layer_config(bits: int, group: int, zero_points: bool, **others: Any) -> MPLinearLayerConfig:
    kind = f"uint{bits}" if zero_points else f"uint{bits}b{2 ** (bits - 1)}"
    settings = {"full_weight_shape": (K, N), "partition_weight_shape": (K, N), "act_type": torch.float32, **others}
    weight_type = getattr(scalar_types, kind)
    return MPLinearLayerConfig(weight_type=weight_type, group_size=group, zero_points=zero_points, **settings)


@contextmanager
def without(*kernels: str) -> Iterator[None]:
    before = os.environ.get("VLLM_DISABLED_KERNELS", "")
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(kernels)
    yield
    os.environ["VLLM_DISABLED_KERNELS"] = before


def chosen(config: MPLinearLayerConfig) -> str:
    """The name of the kernel, or why there is none."""
    try:
        return choose_mp_linear_kernel(config).__name__
    except ValueError as error:
        return str(error)


def check_product(bits: int, group: int, zero_points: bool, rows_first: bool) -> None:
    """The kernel's product is that of the dequantized weight, from compressed-tensors' words or from GPTQ's."""
    generator = torch.Generator().manual_seed(bits)
    size = K if group == -1 else group
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    scale = torch.rand(N, K // size, generator=generator) + 0.1
    zero: Any = float(2 ** (bits - 1))
    if zero_points:
        zero = torch.randint(0, 2**bits, scale.shape, generator=generator).float()
    weight = pack_weight(codes, scale, zero, bits=bits, group_size=size)
    tensors, _ = to_compressed_tensors(weight)
    layer = torch.nn.Module()
    layer.output_partition_sizes = [64, 32]
    names = ["weight_packed", "weight_scale", *(["weight_zero_point"] if zero_points else [])]
    for name in names:
        tensor = tensors[name] if rows_first else tensors[name].t().contiguous()
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        getattr(layer, name).output_dim = 0 if rows_first else 1
    config = layer_config(bits, group, zero_points)
    kernel = choose_mp_linear_kernel(config)(config, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(5, K, generator=generator), torch.randn(N, generator=generator)
    want = torch.nn.functional.linear(x, dequantize_packed(weight, torch.float32), bias)
    torch.testing.assert_close(kernel.apply_weights(layer, x, bias), want, rtol=1e-5, atol=1e-3)


def main() -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    every = list(itertools.product((2, 4, 8), (GROUP, -1), (False, True)))
    with without(THEIRS):
        for bits, group, zero_points in every:
            assert chosen(layer_config(bits, group, zero_points)) == OURS, (bits, group, zero_points)
            for rows_first in (True, False):
                check_product(bits, group, zero_points, rows_first)
    # vLLM's own come first, where they are
    assert chosen(layer_config(4, GROUP, False)) == (THEIRS if vllm_kernel.has_avx512() else OURS)
    with without(THEIRS, OURS):
        assert "GoldenStickLinearKernel disabled" in chosen(layer_config(4, GROUP, False))
    refused = SimpleNamespace(
        width=layer_config(3, GROUP, False),
        activations=layer_config(8, GROUP, False, act_type=torch.float8_e4m3fn, out_type=torch.float32),
        groups=layer_config(8, 48, False),
        columns=layer_config(8, 22, False, partition_weight_shape=(22, N), full_weight_shape=(44, N)),
        rows=layer_config(8, GROUP, True, partition_weight_shape=(K, 30)),
    )
    for name, config in vars(refused).items():
        assert f"{OURS} cannot implement" in chosen(config), name
    print(f"kernel: {len(every)} kinds of layers taken, {len(vars(refused))} refused")


if __name__ == "__main__":
    main()
