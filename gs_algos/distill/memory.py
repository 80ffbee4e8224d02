"""Remembers images that a student was trained on, and shows them again, moved by some pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ImageMemory:
    """Keeps the newest images, in 16 bits, on the device where they came from.

    Args:
        most: images that are kept; then the oldest go.

    images: `[N, C, H, W]` fp16, N >= `len(self)`.
    added: images so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.added = 0
        self.images = torch.empty(0, dtype=torch.float16)

    def __len__(self) -> int:
        return min(self.added, self.most)

    def add(self, x: Tensor) -> None:
        """Keeps a batch `[B, C, H, W]`, B <= `most`."""
        needed = min(self.most, self.added + len(x))
        if needed > len(self.images):
            larger = x.new_empty(min(self.most, max(needed, 2 * len(self.images))), *x.shape[1:], dtype=torch.float16)
            larger[: len(self)] = self.images[: len(self)] if len(self) else 0
            self.images = larger
        slots = (self.added + torch.arange(len(x))) % self.most
        self.images[slots.to(x.device)] = x.to(torch.float16)
        self.added += len(x)

    def restore(self, images: Tensor, added: int, shape: tuple[int, ...]) -> None:
        """Continues with images of `shape` that another memory kept.

        Raises:
            ValueError: if it is not of so many images, or they are of another shape.
        """
        kept = min(added, self.most)
        if images.shape != (kept, *shape) or images.dtype != torch.float16:
            raise ValueError(f"images {list(images.shape)} {images.dtype}, it needs {[kept, *shape]} torch.float16")
        self.images, self.added = images.clone(), added

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draws so many of the images at random, in fp32."""
        picks = torch.randint(len(self), (count,), generator=random)
        return self.images[picks.to(self.images.device)].float()


def moved(x: Tensor, most: int, random: torch.Generator) -> Tensor:
    """Moves each image by up to so many pixels on each axis, drawn at random; pixels at the edge are repeated.

    Args:
        x: `[B, C, H, W]`.
    """
    if not most:
        return x
    count, _, height, width = x.shape
    down, right = torch.randint(2 * most + 1, (2, count, 1), generator=random).to(x.device)  # [B, 1]
    rows, columns = (start + torch.arange(size, device=x.device) for start, size in ((down, height), (right, width)))
    padded = F.pad(x, (most,) * 4, mode="replicate").movedim(1, -1)  # [B, H + 2 most, W + 2 most, C]
    image = torch.arange(count, device=x.device).view(-1, 1, 1)
    return padded[image, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1).contiguous()
