"""Lets several processes calibrate one network: each sees data of its own, and each rounds a share of the layers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """Describes the processes of a group, or this one alone.

    group: None for all processes, if `torch.distributed` runs.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.rank = dist.get_rank(group) if self.several else 0
        self.count = dist.get_world_size(group) if self.several else 1

    def add(self, tensor: Tensor) -> None:
        """Sums a tensor over all processes, in place."""
        if self.several:
            dist.all_reduce(tensor, group=self.group)

    def largest(self, tensor: Tensor) -> None:
        """Takes the largest of all processes, element by element, in place."""
        if self.several:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def from_all(self, data: bytes) -> list[bytes]:
        """Returns what every process gave, in the order of their ranks."""
        return [data] if not self.several else [self.from_one(data, rank) for rank in range(self.count)]

    def from_one(self, data: bytes, rank: int = 0) -> bytes:
        """Returns what one process gave; what the others give is not looked at."""
        if not self.several:
            return data
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        size = torch.tensor([len(data)], device=device)
        dist.broadcast(size, source, group=self.group)
        bytes_ = torch.empty(int(size), dtype=torch.uint8, device=device)
        if self.rank == rank and data:
            bytes_.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(bytes_, source, group=self.group)
        return bytes_.cpu().numpy().tobytes()
