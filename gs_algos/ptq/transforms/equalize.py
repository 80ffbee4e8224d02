"""Makes the ranges of channels equal in layers that follow one another, without data.

Nagel et al. 2019 (Data-Free Quantization), arXiv:1906.04721, section 4.1. Batch norms must be folded before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run, split_inputs
from gs_algos.core.compare import relative_error
from gs_algos.core.modules import get_module
from gs_algos.fx.capture.capture import capture
from gs_algos.fx.consumers import EDGES
from gs_algos.fx.graph import Node, SiteGraph
from gs_algos.fx.op_names import CONVS
from gs_algos.ptq.blocks import first_tensor

ROUNDS = 20
SETTLED = 0.01  # relative change of all scales below which a round is the last
HOMOGENEOUS = ("relu", "leaky_relu", "identity", "dropout", "pool")  # f(s x) = s f(x) for s > 0; dropout: in eval mode
TOLERANCE = 1e-5
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def pair_scale(first: Tensor, second: Tensor) -> Tensor:
    """Computes `sqrt(m0 / m1)`, `[C]`, by which rows are divided and columns multiplied; 1 where a range is 0."""
    alive = (first > 0) & (second > 0)
    return torch.where(alive, (first / torch.where(alive, second, 1.0)).sqrt(), 1.0)


def triple_scales(first: Tensor, middle: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the scales before and behind a depthwise layer: all three ranges become their geometric mean, `[C]`."""
    alive = (first > 0) & (middle > 0) & (last > 0)
    m0, m1, m2 = (torch.where(alive, m, 1.0) for m in (first, middle, last))
    mean = (m0 * m1 * m2) ** (1 / 3)
    return m0 / mean, mean / m2


def row_ranges(layer: nn.Module) -> Tensor:
    """Returns the largest |w| of each output channel, `[O]` fp32."""
    weight: Any = layer.weight
    return weight.detach().float().abs().flatten(1).amax(1)


def column_ranges(layer: nn.Module) -> Tensor:
    """Returns the largest |w| of each input channel, `[C]` fp32."""
    return _columns(layer).float().abs().amax((1, 3)).flatten()


@torch.no_grad()
def divide_rows(layer: Any, scale: Tensor) -> None:
    """Changes rows and bias: the layer returns y / scale."""
    layer.weight.copy_(layer.weight.float() / scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.float() / scale)


@torch.no_grad()
def multiply_columns(layer: Any, scale: Tensor) -> None:
    """Changes columns: the layer takes x / scale for x."""
    columns = _columns(layer)
    new = columns.float() * scale.view(columns.shape[0], 1, columns.shape[2], 1)
    layer.weight.copy_(new.view(layer.weight.shape))


def _columns(layer: Any) -> Tensor:
    """Views the weight as `[groups, O / groups, C / groups, taps]`."""
    weight = layer.weight.detach()
    return weight.reshape(getattr(layer, "groups", 1), -1, weight.shape[1], weight[0, 0].numel())


def equalize(model: nn.Module, example_inputs: Inputs, who: str = "equalize") -> list[tuple[str, ...]]:
    """Equalizes the live network in eval mode; returns the pairs, and triples through a depthwise layer, by name.

    Layers are a pair where nothing but ReLU, leaky ReLU, identity and pools lie between them, and nobody else reads it.

    Raises:
        RuntimeError: if the network's output is another one afterwards. The network is then as it was.
    """
    chains = find_chains(model, example_inputs)
    layers = {name: get_module(model, name) for chain in chains for name in chain}
    before = {p: p.detach().clone() for layer in layers.values() for p in layer.parameters(recurse=False)}
    with evaluating(model):
        want = first_tensor(run(model, example_inputs, who))
        for _ in range(ROUNDS):
            moved = max((_equalize_once([layers[name] for name in chain]) for chain in chains), default=0.0)
            if moved < SETTLED:
                break
        got = first_tensor(run(model, example_inputs, who))
        if want is None or got is None or not bool(want.isfinite().all()):
            return chains  # inputs that are not finite are refused with the layer's name
        error, most = relative_error(got, want), max(TOLERANCE, 4 * torch.finfo(want.dtype).eps)
        if error > most:
            for parameter, value in before.items():
                parameter.copy_(value)
            raise RuntimeError(f"{who}: outputs must stay within {most:.0e}, got a change of {error:.1e}")
    return chains


def _equalize_once(chain: Sequence[nn.Module]) -> float:
    """Does one round on a pair or a triple; returns how far the largest scale is from 1."""
    if len(chain) == 2:
        scales: tuple[Tensor, ...] = (pair_scale(row_ranges(chain[0]), column_ranges(chain[1])),)
    else:
        scales = triple_scales(row_ranges(chain[0]), row_ranges(chain[1]), column_ranges(chain[2]))
    for scale, first, second in zip(scales, chain[:-1], chain[1:], strict=True):
        divide_rows(first, scale)
        multiply_columns(second, scale)
    return max(float((scale - 1).abs().max()) for scale in scales)


def find_chains(model: nn.Module, example_inputs: Inputs, folded: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Returns the pairs of layers to equalize, and triples whose middle one is depthwise, in the order they run in.

    folded: batch norms that are to be folded, and count as nothing.
    """
    args, kwargs = split_inputs(example_inputs)
    graph = capture(model, args, kwargs)
    if graph.tracer not in EDGES:
        return []
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    usable = {
        node.module: node
        for node in graph.nodes
        if node.module is not None and _is_usable(get_module(model, node.module), graph, node, counts)
    }
    follows: dict[str, str] = {}
    for name, node in usable.items():
        reader = _reader(graph, node, folded)
        if reader is not None and reader.module in usable:
            first, second = get_module(model, name), get_module(model, reader.module)
            if len(row_ranges(first)) == len(column_ranges(second)):
                follows[name] = str(reader.module)
    chains: list[tuple[str, ...]] = []
    for first_name, second_name in follows.items():
        if _is_depthwise(get_module(model, second_name)) and second_name in follows:
            chains.append((first_name, second_name, follows[second_name]))
        elif not (_is_depthwise(get_module(model, first_name)) and first_name in follows.values()):
            chains.append((first_name, second_name))
    return chains


def _is_usable(module: Any, graph: SiteGraph, node: Node, counts: Counter[int]) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    once = len(graph.calls(str(node.module))) == 1 and all(counts[id(p)] == 1 for p in own)
    return isinstance(module, LAYERS) and once and module._parameters.get("weight") is not None


def _reader(graph: SiteGraph, node: Node, folded: Collection[str]) -> Node | None:
    """Returns the one layer that reads the node's output, with only homogeneous functions between; None if not so."""
    linear = node.op == "linear"
    while len(node.users) == 1:
        node = graph.nodes[node.users[0]]
        if len(node.inputs) != 1:
            return None
        if node.op in (*CONVS, "linear"):
            return node if (node.op == "linear") == linear else None  # channels are on the same axis
        if node.module not in folded and (node.op not in HOMOGENEOUS or (linear and node.op == "pool")):
            return None
    return None


def _is_depthwise(module: Any) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels == module.out_channels
