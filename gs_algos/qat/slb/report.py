"""Reports a search: as a table of its layers, and as a picture of how their mixtures become codes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.files import whole_file
from gs_algos.qat.slb.layers import SearchedLayer
from gs_algos.qat.slb.schedule import Schedule
from gs_algos.quant.network.summary import layer_table
from gs_algos.quant.packed.module import Packed


def summary_of(model: nn.Module) -> str:
    """Returns a table of a model's searched or packed layers: codes, bytes, how far the search is, the arithmetic."""

    def row(module: nn.Module) -> tuple[Any, ...] | None:
        if isinstance(module, SearchedLayer):
            search = module.search
            state = "one-hot" if search.one_hot else f"searching, gap {search.discretization_gap().item():.3f}"
            nbytes = search.logits.numel() * search.logits.element_size()
            return search.grid, _act(module), f"{nbytes:,} of logits", state, ""
        if isinstance(module, Packed):
            notes = "; ".join(getattr(module, "notes", ()))
            return f"{module.bits}bit", _act(module), f"{module.nbytes:,}", module.path(), notes
        return None

    return layer_table(model, row)


def _act(layer: Any) -> str:
    quantizer = getattr(layer, "input_quantizer", None)
    return "float" if quantizer is None else quantizer.extra_repr()


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
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("SLB.picture: needs matplotlib; pip install 'golden-stick-triton[report]'") from error
    whole = torch.stack(list(traces.values())).numpy()  # [layers, points, 2 + bins]
    points = whole.shape[1]
    steps = [point * schedule.total_steps / max(points - 1, 1) for point in range(points)]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, trace) in enumerate(zip(traces, whole, strict=True)):
        shade = 0.9 * i / max(len(traces) - 1, 1)
        left.plot(steps, trace[:, 0], linewidth=1, color=colormaps["viridis"](shade), label=name)
    left.set(xlabel="optimizer step", ylabel="quantization gap  ||W_c - W_q|| / ||W_q||", ylim=(0, None))
    left.legend(
        *_first_and_last(left), fontsize="x-small", title="first layer dark, last bright", title_fontsize="x-small"
    )
    shares = whole[:, :, 2:].mean(0).T  # [bins, points]
    extent = (0, schedule.total_steps, 0, 1)
    image = right.imshow(shares, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of weights, mean of layers")
    right.plot(steps, whole[:, :, 1].mean(0), color="tab:red", linewidth=1, label="mean")
    right.set(xlabel="optimizer step", ylabel="largest probability of a weight")
    for axes in (left, right):
        axes.axvline(schedule.one_hot_step, color="grey", linestyle=":", linewidth=1)
    right.legend(fontsize="x-small")
    with whole_file(Path(path)) as draft:
        figure.savefig(draft, dpi=120)
    return Path(path)


def _first_and_last(axes: Any) -> tuple[list[Any], list[Any]]:
    """Returns handles and labels of a legend that names two lines of many."""
    handles, labels = axes.get_legend_handles_labels()
    ends = [0, -1] if len(handles) > 1 else [0]
    return [handles[i] for i in ends], [labels[i] for i in ends]
