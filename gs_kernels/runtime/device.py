"""Asks where tensors are, and what the GPU there can do, once per device and at first use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gs_kernels.runtime.torch_private import current_gpu, is_eager

# C functions, without a frame of Python. Callers take them from this module in each call, where a driver that only
# pretends (bench/launches.py) puts its own
on_gpu: Callable[[Tensor], bool] = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
index_of: Callable[[Tensor], int] = Tensor.get_device
current_index: Callable[[], int] = current_gpu
capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing  # a graph
AMD_SM = 80  # whose tiles fit the 64 KiB of shared memory of an AMD GPU too; what torch says of 9.4 is no Hopper


@dataclass(frozen=True)
class Capabilities:
    """Holds what kernels are chosen by.

    name: as the driver says it. sm: 90 for compute capability 9.0, AMD_SM on any AMD GPU. sm_count: number of
    processors.
    """

    name: str
    sm: int
    sm_count: int


_ieee_lock = threading.Lock()
_ieee_calls = 0
_ieee_before = ""


@contextlib.contextmanager
def convolves_in_fp32(x: Tensor) -> Iterator[None]:
    """Convolutions of x inside multiply in fp32 if that is its dtype: cuDNN rounds to TF32 by default, 3e-4 off.

    The setting is one of the process: meanwhile no other thread's fp32 convolutions are in TF32 either. It is as before
    when the last call has left. Compiled and exported convolutions run under the setting of who runs them.
    """
    global _ieee_calls, _ieee_before
    if x.dtype != torch.float32 or x.is_cpu or not is_eager(x):
        yield
        return
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # not in torch's stub
    with _ieee_lock:
        if _ieee_calls == 0:
            _ieee_before, setting.fp32_precision = setting.fp32_precision, "ieee"
        _ieee_calls += 1
    try:
        yield
    finally:
        with _ieee_lock:
            _ieee_calls -= 1
            if _ieee_calls == 0:
                setting.fp32_precision = _ieee_before


@cache
def capabilities(index: int = 0) -> Capabilities:
    props = torch.cuda.get_device_properties(index)
    return Capabilities(
        name=props.name,
        sm=props.major * 10 + props.minor if torch.version.hip is None else AMD_SM,
        sm_count=props.multi_processor_count,
    )
