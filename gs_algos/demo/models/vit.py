"""Builds a small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929; DeiT's "tiny", arXiv:2012.12877)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """`[B, M, K] -> [B, M, K]`: softmax(q k^T / sqrt(d)) v over the M tokens, one linear for q, k and v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)  # [B, heads, M, d]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Computes a pre-norm transformer block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`: patches, learned positions, blocks, a norm, the mean of the tokens.

    Differs from the paper: the mean of the tokens is classified, there is no class token; positions start as large as
    the patches, since at 0.02 a small set takes hundreds of steps to see where a patch is.
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: int, patch: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        if image_size < patch or image_size % patch:
            raise ValueError(f"vit: image_size must be a multiple of {patch}, got {image_size}; resize the images")
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.positions = nn.Parameter(0.5 * torch.randn(1, (image_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # [B, M, dim]
        return self.fc(self.norm(self.blocks(tokens + self.positions)).mean(1))


def vit_tiny(in_channels: int, num_classes: int, image_size: int) -> ViT:
    """Builds width 192, 3 heads. Patch 2 up to 16 pixels, 4 up to 64, 16 above; depth 6 up to 64 pixels, 12 above."""
    patch = 2 if image_size <= 16 else 4 if image_size <= 64 else 16
    return ViT(in_channels, num_classes, image_size, patch, dim=192, depth=6 if image_size <= 64 else 12, heads=3)
