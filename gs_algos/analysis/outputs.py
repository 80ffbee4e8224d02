"""Reads what networks return: which tensor is meant, whether it holds logits, and which of its rows count."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_kernels.runtime.torch_private import tree_leaves


def output_of(outputs: Any) -> Tensor | None:
    """Returns `.logits` of a network's outputs, or the first float tensor in them; None if there is none."""
    found = getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next(tensors, None)


def are_logits(outputs: Tensor) -> bool:
    """Says whether outputs have the form of logits: `[B, classes]`, `[B, T, classes]` or `[B, classes, H, W]`."""
    return outputs.dim() in (2, 3, 4) and outputs.shape[-1 if outputs.dim() < 4 else 1] >= 2


def class_rows(logits: Tensor) -> Tensor:
    """Views logits as `[rows, classes]`: a row for each image, token or pixel."""
    last = logits.movedim(1, -1) if logits.dim() == 4 else logits
    return last.reshape(-1, last.shape[-1])


def kept_samples(logits: Tensor, batch: Inputs) -> Tensor:
    """Says which samples count: `[B]`, or `[B, T]` for tokens; those of padding do not."""
    shape = logits.shape[:2] if logits.dim() == 3 else logits.shape[:1]
    mask = split_inputs(batch)[1].get("attention_mask")
    if logits.dim() == 3 and isinstance(mask, Tensor) and mask.shape == shape:
        return mask.to(logits.device) != 0
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(p || q) of each row, from log-probabilities `[rows, classes]`.

    As sum p (log p - log q) + q - p, whose terms are all >= 0: distributions that are nearly one keep their difference.
    """
    gap = log_p - log_q
    return (log_p.exp() * (torch.expm1(-gap) + gap)).sum(-1)
