"""The picture of a search: how far each layer's mixture is from its codes, and how the softmax becomes one-hot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gs_algos.qat.slb_schedule import Schedule


def draw(traces: Mapping[str, Tensor], schedule: Schedule, path: str | os.PathLike[str]) -> Path:
    """Writes the picture; its format is that of the file name.

    Args:
        traces: as `SLB.traces`.

    Raises:
        ValueError: if there is nothing to draw, or matplotlib is missing.
    """
    if not traces:
        raise ValueError("SLB.picture: trace must be > 0 points, got 0; make the algorithm with trace=50")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("SLB.picture: needs matplotlib; pip install 'golden-stick-triton[report]'") from error
    whole = torch.stack(list(traces.values()))  # [layers, points, 2 + bins]
    points = whole.shape[1]
    steps = torch.arange(points, dtype=torch.float64) * schedule.total_steps / max(points - 1, 1)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, trace in traces.items():
        left.plot(steps, trace[:, 0], linewidth=1, label=name)
    left.set(xlabel="optimizer step", ylabel="quantization gap  ||W_c - W_q|| / ||W_q||", ylim=(0, None))
    if len(traces) <= 12:
        left.legend(fontsize="x-small")
    shares = whole[:, :, 2:].mean(0).T  # [bins, points]
    extent = (0, schedule.total_steps, 0, 1)
    image = right.imshow(shares, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of weights, mean of layers")
    right.plot(steps, whole[:, :, 1].mean(0), color="tab:red", linewidth=1, label="mean")
    right.set(xlabel="optimizer step", ylabel="largest probability of a weight")
    for axes in (left, right):
        axes.axvline(schedule.one_hot_step, color="grey", linestyle=":", linewidth=1)
    right.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    return Path(path)
