"""Counts the multiply-adds of a forward, and the bits that they multiply, in float and in quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.quant.packed.embedding import PackedEmbedding
from gs_algos.quant.packed.module import Packed
from gs_kernels.runtime.torch_private import TorchDispatchMode, tree_leaves

aten = torch.ops.aten


@dataclass
class Operations:
    """Holds multiply-adds (macs), and the sum of `macs x bits of weight x bits of activation` (bops)."""

    macs: int = 0
    bops: int = 0


def count_operations(net: nn.Module, inputs: Inputs, who: str) -> Operations:
    """Counts those of one forward in eval mode.

    Counted are linears, convolutions, recurrent layers and products of two tensors, attention's among them. Floats
    have the bits of their dtype; codes those of their scheme, whatever width they are stored and multiplied in.

    Raises:
        ValueError: if the inputs do not run through the network.
    """
    found = Operations()
    counter = _FloatCounter(found)
    with evaluating(net), _packed_layers(net, found, counter), counter:
        run(net, inputs, who)
    return found


class _FloatCounter(TorchDispatchMode):
    """Counts the operations of ATen, outside of packed layers."""

    def __init__(self, found: Operations) -> None:
        super().__init__()
        self.found, self.inside = found, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            macs = _macs(func, args, kwargs or {}, out)
            if macs:
                bits = _bits((args, kwargs))
                self.found.macs += macs
                self.found.bops += macs * bits * bits
        return out


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    if packet in _OTHERS:
        return _OTHERS[packet](*args)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out)) // 2


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    *batch, rows, width = query.shape
    return torch.Size(batch).numel() * rows * key.shape[-2] * (width + value.shape[-1])


def _lstm_macs(x: Tensor, weight: Tensor, recurrent: Tensor, *_: Any) -> int:
    return x.shape[0] * x.shape[1] * (weight.numel() + recurrent.numel())


def _grouped_macs(x: Tensor, weights: Tensor, *_: Any) -> int:
    return x.numel() * weights.shape[-1]


# operations that PyTorch's own counter leaves out
_OTHERS: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: _grouped_macs,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_macs,
    aten.mkldnn_rnn_layer: _lstm_macs,
}


def _bits(values: Any) -> int:
    """Returns the bits of the first float tensor; 32 if there is none."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next((8 * t.dtype.itemsize for t in tensors), 32)


@contextmanager
def _packed_layers(net: nn.Module, found: Operations, counter: _FloatCounter) -> Iterator[None]:
    """Counts the packed layers that run in the block, each `outputs x K`, and keeps the counter out of them."""

    def enter(layer: nn.Module, args: Any) -> None:
        counter.inside += 1

    def leave(layer: Any, args: Any, kwargs: Any, y: Any) -> None:
        counter.inside -= 1
        macs = y.numel() * layer.shape[1]
        found.macs += macs
        found.bops += macs * weight_bits(layer) * (act_bits(layer) or _bits((args, kwargs)))

    with ExitStack() as stack:
        for layer in net.modules():
            if isinstance(layer, Packed) and not isinstance(layer, PackedEmbedding):
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def weight_bits(layer: Packed) -> int:
    """Returns the bits of a packed weight's codes, by its scheme where it has one."""
    return int(getattr(layer, "scheme", layer).bits)


def act_bits(layer: Packed) -> int:
    """Returns the bits of the codes that a packed layer multiplies its weight with; 0 if it reads floats."""
    quantizer = getattr(layer, "input_quantizer", None)
    if quantizer is not None:
        return int(quantizer.scheme.bits)
    return 8 if getattr(layer, "act", None) else 0
