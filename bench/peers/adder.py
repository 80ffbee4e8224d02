"""L1 products by PyTorch's own function of distances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from gs_kernels.qconv2d.geometry import Padding, Pair, make_geometry


def cdist_linear(x: Tensor, weight: Tensor) -> Tensor:
    return -torch.cdist(x, weight, p=1.0)


def cdist_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Padding, dilation: Pair) -> Tensor:
    """Unfolds the image; the gradient is that of the formula, signs, and so does not agree with adder networks'."""
    g = make_geometry("cdist_conv2d", (weight.shape[2], weight.shape[3]), stride, padding, dilation, 1)
    patches = unfold(pad(x, g.sides), (g.r, g.s), g.dilation, 0, g.stride).mT
    return cdist_linear(patches, weight.flatten(1)).mT.unflatten(2, g.output(*x.shape[2:]))
