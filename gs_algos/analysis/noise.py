"""Measures by how much rounding each weight changes the outputs of its own layer, in one forward pass of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from gs_algos.analysis.fisher import RoundedLayer
from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.modules import get_module
from gs_algos.core.network import ordinary_tensors, without_autocast
from gs_algos.core.progress import progress


def noise_scores(
    network: nn.Module, batches: Sequence[Inputs], choices: Mapping[str, Sequence[str]], who: str
) -> dict[str, dict[str, float]]:
    """Returns layer -> scheme -> noise over signal, `sum dy^2 / sum y^2` of the layer's outputs; 0 where none ran."""
    noise = {site: dict.fromkeys(schemes, 0.0) for site, schemes in choices.items()}
    signal = dict.fromkeys(choices, 0.0)

    def watch(site: str, layer: RoundedLayer) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            x = tensor_in((args, kwargs))
            signal[site] += float(y.double().square().sum())
            for scheme in layer.grids:
                noise[site][scheme] += float(layer.change(x, scheme).double().square().sum())

        return after

    with ordinary_tensors(), without_autocast(), evaluating(network), ExitStack() as stack:
        for site, schemes in choices.items():
            layer = RoundedLayer.of(get_module(network, site), schemes)
            handle = layer.layer.register_forward_hook(watch(site, layer), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        for batch in progress(batches, "measuring sensitivity"):
            run(network, batch, who)
    return {site: {s: total / (signal[site] or 1.0) for s, total in own.items()} for site, own in noise.items()}
