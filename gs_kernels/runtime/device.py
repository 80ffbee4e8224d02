"""Asks the driver what the GPU can do, once per device and at first use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


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
