"""Makes a training set from a network: images of a generator, and the network's own answers as labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from gs_algos.cli.demo import bar
from gs_algos.core.algorithm import evaluating
from gs_algos.core.files import write_atomically
from gs_algos.demo.data import ImageData
from gs_algos.demo.train import Interrupted, interrupts
from gs_algos.distill.synthesis import Synthesis

NAME = "synthetic"  # of the data set, in `compress --data`
STEPS = 2000  # of the generator, unless a recipe says how many
IMAGES = 10_240


def synthetic_data(net: nn.Module, data: ImageData, steps: int, seed: int, state: Path, resume: bool) -> ImageData:
    """Trains a generator against a float network; returns the set with its images, and their labels, to train on.

    Of `data` only sizes, the mean and the standard deviation of pixels and the test set are used.

    Args:
        state: file that holds the generator and its optimizer, at the end and after an interrupt.
        resume: continue from `state` if it is there.

    Raises:
        ValueError: if the state is of another run.
        RuntimeError: if the generator has collapsed.
        Interrupted: after Ctrl-C.
    """
    size = data.image_size
    images = Synthesis(net, (data.channels, size, size), seed=seed)
    if resume and state.is_file():
        try:
            images.load_state_dict(load_file(state))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"compress: {state} must be of this run, got {error}; delete it to start over") from error
    with bar(f"synthetic images, {steps} steps") as on_step, interrupts() as interrupted:
        while images.steps < steps and not interrupted():
            images.step()
            on_step(images.steps, steps, torch.tensor(float("nan")))
    write_atomically(state, to_bytes({key: t.detach().cpu().contiguous() for key, t in images.state_dict().items()}))
    if images.steps < steps:
        raise Interrupted(f"compress: stopped after {images.steps} of {steps} steps of the generator; saved in {state}")
    made = torch.cat(images.batches(-(-IMAGES // images.batch_size)))[:IMAGES]
    mean, std = (torch.tensor(values, device=made.device).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = ((made * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    with evaluating(net):
        labels = torch.cat([net(data.normalize(part)).argmax(1) for part in pixels.split(images.batch_size)])
    return replace(data, name=f"{data.name}, {NAME}", train_x=pixels, train_y=labels)
