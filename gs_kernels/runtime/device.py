"""Asks where tensors are, and what the GPU there can do, once per device and at first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gs_kernels.runtime.torch_private import current_gpu

# C functions, without a frame of Python. Callers take them from this module in each call, where a driver that only
# pretends (bench/launches.py) puts its own
on_gpu: Callable[[Tensor], bool] = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
index_of: Callable[[Tensor], int] = Tensor.get_device
current_index: Callable[[], int] = current_gpu
capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing  # a graph


@dataclass(frozen=True)
class Capabilities:
    """Holds what kernels are chosen by.

    name: as the driver says it. sm: 90 for compute capability 9.0. shared_bytes: per block, opt-in. sm_count: number of
    processors.
    """

    name: str
    sm: int
    shared_bytes: int
    sm_count: int


@cache
def capabilities(index: int = 0) -> Capabilities:
    props = torch.cuda.get_device_properties(index)
    return Capabilities(
        name=props.name,
        sm=props.major * 10 + props.minor,
        shared_bytes=props.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in torch's stub
        sm_count=props.multi_processor_count,
    )
