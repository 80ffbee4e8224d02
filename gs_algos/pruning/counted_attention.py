"""Attention of `nn.MultiheadAttention` with as many heads as it counts, which need not fill its width.

PyTorch's own takes the width of a head from that of the query, so it cannot run with some heads gone. The class of the
live module is swapped; its parameters keep their names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.core.modules import swapped_class


class CountedAttention(nn.Module):
    """Computes what `nn.MultiheadAttention` does, over `num_heads` heads of `head_dim`; mixed in front of its class."""

    prefix = "Counted"

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Returns False, which keeps `nn.TransformerEncoderLayer` from its fused path: that reads the weights alone."""
        return False

    def head_columns(self) -> Tensor | None:
        """Returns a factor for each column of the output projection, `[num_heads * head_dim]`; None for 1."""
        return None

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs as `nn.MultiheadAttention.forward` does; `is_causal` is a hint about `attn_mask`, and not needed.

        Raises:
            ValueError: if `attn_mask` is of another number of heads.
        """
        batched, first = query.dim() == 3, self.batch_first
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q, k)  # q [B, heads, L, d]; mask: of [B, heads, L, S]
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-1, -2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, rate)
        y, factors = y.transpose(1, 2).flatten(2), self.head_columns()
        y = F.linear(y if factors is None else y * factors.to(y.dtype), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if first else y.transpose(0, 1), weights

    def _projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns q, k, v, `[B, L or S, heads * d]`, with what `bias_k` and `add_zero_attn` put behind k and v."""
        fused = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if fused is None else fused.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None:
            k, v = (torch.cat([t, b.expand(len(t), 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(len(t), 1, t.size(2))], 1) for t in (k, v))
        return [q, k, v]

    def _mask(self: Any, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Returns the sum of the masks, as floats that are added to the scores."""
        batch, heads, length, own = *q.shape[:3], k.size(2)
        masks = []
        if attention is not None:
            if attention.dim() == 3 and len(attention) != batch * heads:
                raise ValueError(
                    f"MultiheadAttention: attn_mask must have batch * heads = {batch * heads} rows after some heads "
                    f"were cut, got {len(attention)}; give one of [L, S] for all heads"
                )
            shape = (batch, heads, length, -1) if attention.dim() == 3 else (1, 1, length, -1)
            masks.append(_added(attention, q.dtype).view(shape))
        if padding is not None:
            masks.append(_added(padding, q.dtype).view(batch, 1, 1, -1))
        masks = [F.pad(mask, (0, own - mask.size(-1))) for mask in masks]
        return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def count_heads(module: nn.MultiheadAttention) -> None:
    """Makes a live module one that runs with the heads that it counts."""
    if not isinstance(module, CountedAttention):
        module.__class__ = swapped_class(CountedAttention, type(module))
