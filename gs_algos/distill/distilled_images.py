"""Makes images from the batch norms of a network alone: pixels are trained until each norm sees what it remembers.

Cai et al. 2020, arXiv:2001.00281 (ZeroQ). Differs from it: distances are in standard deviations of each channel, so
that none is left out for being small, pixels stay within the range that they have in real images, and they start as
noise of several sizes.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gs_algos.core.algorithm import run
from gs_algos.core.arguments import as_seed
from gs_algos.core.batches import device_of
from gs_algos.core.network import network_of
from gs_algos.core.progress import progress
from gs_algos.distill.teacher import teacher_from
from gs_kernels.runtime.torch_private import _BatchNorm

WHO = "distilled_images"
COARSEST = 4  # pixels of a side, of the noise that images start from
logger = logging.getLogger(__name__)


def distilled_images(
    network: nn.Module,
    shape: tuple[int, int, int],
    count: int = 8,
    *,
    pixels: tuple[float, float],
    steps: int = 100,
    lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Makes images whose statistics are those that the batch norms of a network remember, to calibrate it without data.

    ```python
    images = distilled_images(net, (3, 224, 224), pixels=(-2.1, 2.6))
    algo.calibrate(net, images.split(1))  # of PTQ, or SimQAT
    ```
    Minimizes by Adam, whose rate falls to 0 by a cosine, the mean over norms and channels of
    `(m - mean)^2 / v + (s / sqrt(v) - 1)^2`, with m and s the mean and the standard deviation of what a norm reads of
    all images together, mean the running one and v = running variance + eps. The network is copied and stays as it is.

    Args:
        network: with batch norms that were trained and are not folded. What it returns does not matter.
        shape: `(C, H, W)` of an image. Half the side at which the network was trained costs a quarter.
        count: images; all go through the network at once.
        pixels: the least and the largest value of an input as the network takes it, of all channels: (-1, 1), or
            `((0 - mean) / std, (1 - mean) / std)` of normalized images. The grid of the first layer depends on it.
        steps: of Adam.
        lr: its first rate, for pixels from -1 to 1; it grows with the range.
        seed: of the noise that images start from.

    Returns:
        `[count, C, H, W]` fp32, on the network's device.

    Raises:
        ValueError: if an argument is out of its range, the images do not run through the network, or no batch norm with
            running statistics reads them.
        RuntimeError: if the distance is not finite.
    """
    sizes = tuple(shape) if isinstance(shape, tuple | list) else ()
    if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes) or sizes[1] * sizes[2] < 2:
        raise ValueError(f"{WHO}: shape must be (C, H, W) of two or more pixels, got {shape!r:.60}")
    for name, number in (("count", count), ("steps", steps)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{WHO}: {name} must be a whole number >= 1, got {number!r:.60}")
    ends = tuple(pixels) if isinstance(pixels, tuple | list) else ()
    if (
        len(ends) != 2
        or not all(isinstance(end, int | float) for end in ends)
        or not -math.inf < ends[0] < ends[1] < math.inf
    ):
        raise ValueError(f"{WHO}: pixels must be (least, largest), finite, got {pixels!r:.60}")
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"{WHO}: lr must be finite and > 0, got {lr!r:.60}")
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _trained(network, (count, *sizes), ends, steps, lr, seed)


def _trained(
    network: nn.Module, shape: tuple[int, ...], pixels: tuple[float, ...], steps: int, lr: float, seed: int
) -> Tensor:
    low, high = map(float, pixels)
    copied = teacher_from(network_of(network, WHO)).float()
    distances: list[Tensor] = []

    def keep_distance(norm: Any, args: tuple[Any, ...]) -> None:
        distances.append(distance(args[0], norm))

    for module in copied.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.register_forward_pre_hook(keep_distance)
    random = torch.Generator().manual_seed(as_seed(seed, f"{WHO}: seed"))
    start = (low + high) / 2 + (high - low) / 4 * noise(shape, random)
    x = start.clamp(low, high).to(device_of(copied) or torch.device("cpu")).requires_grad_()
    optimizer = torch.optim.Adam([x], lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: (high - low) / 2 * (1 + math.cos(math.pi * done / steps)) / 2
    )
    first = math.nan
    for step in progress(range(steps), "making images from batch norms"):
        distances.clear()
        run(copied, x, WHO)
        if not distances:
            raise ValueError(
                f"{WHO}: the network must have batch norms with running statistics, got none that reads the images; "
                "give it as it was before they were folded, calibrate on real inputs, or use Synthesis"
            )
        loss = torch.stack(distances).mean()
        if not loss.isfinite():
            told = "lower lr" if step else "are the network's weights and statistics finite?"
            raise RuntimeError(f"{WHO}: the distance must be finite, got {loss.item()} in step {step}; {told}")
        first = loss.item() if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(low, high)
    logger.info("%s: distance from %d batch norms %.3g -> %.3g", WHO, len(distances), first, loss.item())
    return x.detach()


def distance(x: Tensor, norm: Any) -> Tensor:
    """Computes `mean((m - mean)^2 / v + (s / sqrt(v) - 1)^2)` over the channels of what a batch norm reads."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean, variance = x.mean(axes), x.var(axes, unbiased=False)
    wanted = norm.running_var + norm.eps
    spread = ((variance + norm.eps) / wanted).sqrt()
    return ((mean - norm.running_mean).square() / wanted + (spread - 1).square()).mean()


def noise(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Adds noise of squares of one pixel and of grids of 4, 8, ... squares a side; standard deviation 1 a channel."""
    x = torch.randn(shape, generator=random)
    side = COARSEST
    while side < min(shape[2:]):
        coarse = torch.randn(*shape[:2], side, side, generator=random)
        x += F.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=False)
        side *= 2
    return x / x.std((0, 2, 3), keepdim=True)
