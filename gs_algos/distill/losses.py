"""Computes what a student is off its teacher: in its logits, and in the outputs of its layers. All in fp32.

Logits: Hinton et al. 2015, arXiv:1503.02531; standardized: Sun et al. 2024, arXiv:2403.01643. Outputs of layers: Romero
et al. 2015, arXiv:1412.6550 (mse); Zagoruyko and Komodakis 2017, arXiv:1612.03928 (attention); Xu et al. 2020,
arXiv:2009.13044 (kernel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gs_kernels import kl_divergence

EPSILON = 1e-7
DEEPEST = -20.0  # smallest exponent of the kernel map


def logit_sum(
    student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Returns `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, summed over classes and rows.

    Args:
        student: `[..., classes]`.
        teacher: like `student`.
        standardize: give each row mean 0 and standard deviation 1 first.
        mask: `[...]`, rows that count; None counts all.
    """
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    student, teacher = (x.float() if x.dtype == torch.float64 else x for x in (student, teacher))
    rows = kl_divergence(student, teacher, temperature=temperature)
    return temperature**2 * (rows if mask is None else rows * mask.to(rows.dtype)).sum()


def standardized(logits: Tensor) -> Tensor:
    """Returns each row `[..., classes]` with mean 0 and standard deviation 1, in fp32."""
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + EPSILON)


def channel_axis(feature: Tensor) -> int:
    """Returns the axis of the channels: 1 of images and volumes, the last of tokens and vectors."""
    return 1 if feature.dim() > 3 else feature.dim() - 1


def projected(feature: Tensor, weight: Tensor | None) -> Tensor:
    """Returns the feature in fp32, its channels multiplied by `weight` [to, from]: a 1x1 convolution."""
    feature = feature.float()
    if weight is None:
        return feature
    axis = channel_axis(feature)
    return F.linear(feature.movedim(axis, -1), weight.float()).movedim(-1, axis)


def attention_map(feature: Tensor) -> Tensor:
    """Returns `[B, positions]`: the mean of the squares over the channels, each image's map of length 1."""
    return F.normalize(feature.float().square().mean(channel_axis(feature)).flatten(1))


def kernel_map(feature: Tensor, width: Tensor) -> Tensor:
    """Returns `exp(f / (2 width^2))` of f in units of its root mean square, each image's largest value 1.

    The shift to a largest exponent of 0 keeps it in range, and is undone by `image_standardized`.
    """
    feature = feature.float()
    unit = feature.detach().square().mean().sqrt().clamp(min=EPSILON)
    exponent = (feature / unit / (2 * width.float().square())).flatten(1)
    exponent = exponent - exponent.amax(1, keepdim=True)
    return exponent.clamp(min=DEEPEST).exp().view_as(feature)


def image_standardized(feature: Tensor) -> Tensor:
    """Returns what each image has with mean 0 and standard deviation 1: two maps that shrink do not come closer."""
    flat = feature.flatten(1)
    return (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + EPSILON)


def feature_loss(
    kind: str, student: Tensor, teacher: Tensor, weight: Tensor | None = None, widths: Tensor | None = None
) -> Tensor:
    """Returns how far two outputs of layers are apart, by `DistillConfig.kind`.

    Args:
        student: `[B, C, ...]`, or `[B, tokens, C]`.
        teacher: `[B, D, ...]`, or `[B, tokens, D]`.
        weight: `[D, C]` of the 1x1; None if the channels are compared as they are.
        widths: `[2]` of kind `kernel`, the student's and the teacher's.
    """
    if kind == "attention":
        return F.mse_loss(attention_map(student), attention_map(teacher))
    if kind == "kernel":
        assert widths is not None
        own = projected(kernel_map(student, widths[0]), weight)
        return F.mse_loss(image_standardized(own), image_standardized(kernel_map(teacher, widths[1])))
    return F.mse_loss(projected(student, weight), teacher.float())


def first_projection(to: int, channels: int) -> Tensor:
    """Returns the 1x1 that a training begins with, `[to, from]`: the identity, or else random, the same each time."""
    if to == channels:
        return torch.eye(to)
    random = torch.Generator().manual_seed(0)
    return torch.randn(to, channels, generator=random) * channels**-0.5
