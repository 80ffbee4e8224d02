"""Keeps tensors in files that are mapped into memory: pages of them that are not in use cost no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gs_algos.core.files import naming_target, remove


def in_file(tensor: Tensor, path: Path) -> Tensor:
    """Returns a tensor of the same values that is mapped from a file; what is written to it goes to the file.

    path: of a file that is not there, is made and has no name behind the call: it is gone once nobody holds the tensor.

    Raises:
        OSError: with the path if it cannot be written, as where the disk is full; nothing is left there.
    """
    if not tensor.numel():
        return tensor.detach().cpu()
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    try:
        with naming_target(path), open(path, "xb") as file:
            file.write(data)
    except OSError:
        remove(path)
        raise
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    path.unlink()
    return mapped
