"""Turns off torch's fast path of transformer encoders, which reads float weights past the layers' forward.

In eval mode without gradients `nn.TransformerEncoderLayer` is one fused call on the weights of its children, and
`nn.TransformerEncoder` hands its layers nested tensors where there is a padding mask. Neither runs a layer that rounds.
"""

from __future__ import annotations

from torch import nn


class OffFastPath:
    """Keeps torch's fast path of transformers off modules that replace a float weight or round an input."""


def leave_fast_path(model: nn.Module) -> None:
    """Makes every encoder of torch that holds a quantized, searched or packed layer run its layers one by one.

    Sets the flags by which torch itself leaves the fast path, so copies and pickles keep them. Encoders without such
    layers stay as they are.
    """
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and _holds_ours(module):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def _holds_ours(module: nn.Module) -> bool:
    return any(isinstance(child, OffFastPath) for child in module.modules())
