"""Keeps channels whole that an in-place operation tells from the others of their tensor, as `y[:, :4] = 0` does.

Which channels it changes is a number in the model's code: once one of them is cut, that number stands for others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gs_algos.pruning.channel_groups.trace import ChannelFlow, OpCall


def freeze_partial_writes(flow: ChannelFlow, call: OpCall) -> None:
    """Freezes the channels of every tensor that an in-place operation changes for some of its channels only."""
    for target in call.written():
        if not _is_plain(target) or target.numel() * target.element_size() == target.untyped_storage().nbytes():
            continue
        named = (*flow.model.parameters(), *flow.model.buffers())
        for tensor in {id(t): t for t in (*list(flow.seen), *named)}.values():
            if not (_is_plain(tensor) and _same_memory(tensor, target)):
                continue
            written = _written(tensor, target)
            if not bool(written.any()):
                continue
            for labels in flow.value(tensor).fields:
                across = [d for d in range(labels.dim()) if labels.size(d) == 1]
                if not bool((written.amax(across) if across else written).all()):
                    flow.atoms.freeze(labels, f"has some of its channels changed in place by {flow.where(call)}")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _written(tensor: Tensor, target: Tensor) -> Tensor:
    """Marks the elements of `tensor` that lie in `target`, a view of the same memory: bool, shaped like `tensor`."""
    if tensor.element_size() != target.element_size():
        first = torch.zeros(tensor.shape, dtype=torch.bool, device="cpu")
        first.view(-1)[:1] = True  # which elements cannot be told, so none counts as whole
        return first
    n = target.untyped_storage().nbytes() // target.element_size()
    memory = torch.zeros(n, dtype=torch.bool, device="cpu")
    memory.as_strided(target.shape, target.stride(), target.storage_offset()).fill_(True)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
