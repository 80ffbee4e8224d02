"""Finds the layer that can take the scale of a stage's input back, and proves it on the network itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.compare import relative_error
from gs_algos.ptq.blocks import Block, recorded
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.streams import Streams
from gs_algos.quant.packed.packable import base_of, matrix_of

TOLERANCE = 1e-5  # relative change of the block's output, above that of its dtype
PROBE = 64.0  # a power of two, so that products stay the same bits; far from 1, so that no clamp is missed
TRIES = 4  # linears that are tried, from the nearest back
OFFSETS = (0.0, 1.0)  # of the gain of a norm: its weight, or 1 + weight


@dataclass(frozen=True)
class Producer:
    """Names the layer whose output is the input of a stage, or makes it column by column.

    offset: of a norm, whose gain is `weight + offset`.
    norm: whether it is a norm, whose very output they read.
    """

    name: str
    offset: float = 0.0
    norm: bool = False


def divide_output(module: nn.Module, scale: Tensor, offset: float = 0.0) -> None:
    """Changes the weight of a norm `[K]`, or the rows of a linear, and its bias: it returns y / scale."""
    weight: Any = module._parameters["weight"]
    bias: Any = module._parameters.get("bias")
    with torch.no_grad():
        if weight.dim() == 1:
            weight.copy_((weight.float() + offset) / scale - offset)
        else:
            rows = matrix_of(module, weight)
            rows.copy_(rows.float() / scale.unsqueeze(1))
        if bias is not None:
            bias.copy_(bias.float() / scale)


def multiply_input(layer: nn.Module, scale: Tensor) -> None:
    """Changes the float weight `[N, K]` of a linear to `W * scale`."""
    weight: Any = layer._parameters["weight"]
    with torch.no_grad():
        rows = matrix_of(layer, weight)
        rows.copy_(rows.float() * scale)


def probe_scale(columns: int, device: torch.device) -> Tensor:
    """Returns powers of two `[columns]`, far from 1 on both sides, that tell whether a scale is taken back."""
    up = torch.randint(0, 2, (columns,), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    return torch.where(up == 1, PROBE, 1 / PROBE)


def shift_output(module: nn.Module, sinks: Iterable[Rounded], shift: Tensor) -> None:
    """Changes the bias of a norm, so that it returns y - shift, and those of the linears that read it, `[N, K]`."""
    with torch.no_grad():
        bias: Any = module._parameters["bias"]
        bias.copy_(bias.float() - shift)
        for layer in sinks:
            own: Any = layer._parameters["bias"]
            own.copy_(own.float() + matrix_of(layer, layer.float_weight).float() @ shift)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the parameters of modules back behind the block."""
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def find_producer(
    model: nn.Module,
    streams: Streams,
    block: Block,
    sinks: Mapping[str, Rounded],
    usable: Callable[[nn.Module, str], bool],
    float_network: Callable[[], AbstractContextManager[None]],
) -> Producer | str:
    """Returns the layer that can take the scale of the sinks' input back, or why there is none.

    It is the norm whose very output they read, or a linear from which nothing but products with other tensors and
    functions without a scale of their own lead to them: the value projection, the linear beside a gate. Each is tried:
    with its output divided and the sinks' weights multiplied by powers of two, the block must give the same output.

    Args:
        sinks: the layers that read the tensor, by name.
        usable: says of a linear whether its rows may be scaled.
    """
    first = next(iter(sinks))
    columns = matrix_of(sinks[first], sinks[first].float_weight).shape[1]
    if any(base_of(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for layer in sinks.values()):
        return "a convolution reads it"
    shared = shared_parameters(model)
    if any(id(layer.float_weight) in shared for layer in sinks.values()):
        return "a weight that reads it is shared with another layer"
    inside = [(name, module) for name, module in model.named_modules() if block.holds(name)]
    with float_network(), recorded(inside) as calls:
        want = streams.run_block(block, 0, streams.quantized)
    if first not in calls or want is None:
        return "the first batch does not reach it"
    x = calls[first].first
    assert x is not None
    modules = dict(inside)
    for name, call in calls.items():
        reads = any(t is x for t in (call.first, *call.others)) and call.given is not x
        if reads and name not in sinks and is_leaf(modules[name]):
            return f"{name} reads it, too"
    free = [
        call
        for call in calls.values()
        if call.count == 1
        and call.name not in sinks
        and not any(id(p) in shared for p in modules[call.name].parameters(recurse=False))
    ]
    norms = [call for call in free if call.given is x and is_norm(modules[call.name], columns)]
    linears = [
        call
        for call in sorted(free, key=lambda call: -call.begun)
        if 0 < call.ended < calls[first].begun
        and has_outputs(modules[call.name], columns)
        and usable(modules[call.name], call.name)
    ]
    tried = [Producer(call.name, offset, norm=True) for call in norms for offset in OFFSETS]
    tried += [Producer(call.name) for call in linears[:TRIES]]
    for producer in tried:
        if _holds(producer, modules[producer.name], sinks, streams, block, want, float_network):
            return producer
    if norms:
        return f"more than these layers reads what {norms[0].name} returns"
    return "neither a norm nor a linear makes it that could take the scale back"


def _holds(
    producer: Producer,
    module: nn.Module,
    sinks: Mapping[str, Rounded],
    streams: Streams,
    block: Block,
    want: Tensor,
    float_network: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Says whether the block's output stays the same when the producer divides and the sinks multiply."""
    layer = next(iter(sinks.values()))
    columns = matrix_of(layer, layer.float_weight).shape[1]
    scale = probe_scale(columns, layer.float_weight.device)
    with restored([module, *sinks.values()]), float_network():
        divide_output(module, scale, producer.offset)
        for sink in sinks.values():
            multiply_input(sink, scale)
        got = streams.run_block(block, 0, streams.quantized)
    eps = torch.finfo(want.dtype).eps
    return got is not None and relative_error(got, want) <= max(TOLERANCE, 4 * eps)


def shared_parameters(model: nn.Module) -> set[int]:
    """Identifies the parameters that several modules hold."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


def is_leaf(module: nn.Module) -> bool:
    return isinstance(module, Rounded) or next(module.children(), None) is None


def is_norm(module: nn.Module, columns: int) -> bool:
    """Says whether a module has a weight for each column, a bias of that shape or none, and nothing else."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if not is_leaf(module) or "weight" not in own or own.keys() - {"weight", "bias"}:
        return False
    return all(p.shape == (columns,) and p.is_floating_point() for p in own.values())


def has_outputs(module: nn.Module, columns: int) -> bool:
    weight: Any = module._parameters.get("weight")
    linear = base_of(module) not in (None, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return linear and weight is not None and len(matrix_of(module, weight)) == columns
