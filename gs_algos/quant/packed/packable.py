"""Says which float layers can be packed, and makes the packed layer that replaces each.

Layers of torch.nn, of subclasses that only construct themselves in another way or write the product of a linear as
`x @ W.T + bias` (FalconLinear), and Conv1D of Transformers, which GPT-2 is made of: `y = x @ W + bias`, W `[K, N]`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import computed_by, own_forward
from gs_algos.fx.modularize.functional_calls import multiplies_alone
from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.conv_base import conv_rows, geometry_of, is_channels_last
from gs_algos.quant.packed.embedding import PackedEmbedding
from gs_algos.quant.packed.experts import ExpertStack
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedConv1D, PackedLinear
from gs_algos.quant.packed.module import Packed, PackedFormat
from gs_algos.quant.packed.round_to_nearest import packed_format, round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight
from gs_kernels.pack.rows import stack_rows

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # that a packed layer computes in
# what a subclass may define and still be the layer that it is derived from
CONSTRUCTION = {"extra_repr", "reset_parameters", "_reset_parameters"}
# what nn.Module keeps for itself: not to be carried over to another module
_MODULE = {*nn.Module().__dict__, "_compiled_call_impl"}


def base_of(layer: nn.Module) -> type[nn.Module] | None:
    """Returns the class that a layer is, or is derived from: nn.Linear, nn.Conv2d, ...; None for other modules."""
    loaded = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    bases = (nn.Linear, nn.Embedding, *CONVS, *([] if loaded is None else [loaded]))
    return next((base for base in bases if isinstance(layer, base)), None)


def is_conv1d(layer: nn.Module) -> bool:
    """Says whether it is Conv1D of Transformers, whose weight is `[K, N]`."""
    return base_of(layer) not in (None, nn.Linear, nn.Embedding, *CONVS)


def why_not(layer: nn.Module) -> str:
    """Says why a layer that has a `base_of` cannot be packed; "" if it can."""
    if isinstance(layer, ExpertStack):
        return _why_not_dtype(layer.weight)
    base: Any = base_of(layer)
    kind, cls = type(layer).__name__, type(layer)
    weight = layer._parameters.get("weight")
    if weight is None:
        return f"its weight is no parameter but comes from {computed_by(layer)}; make it a plain weight first"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is multiplied inside nn.MultiheadAttention, not by a layer"
    reason, alone = own_forward(layer, base), False
    if reason:
        alone = base is nn.Linear and multiplies_alone(layer)
        if not alone:
            return reason
    own = {name for part in cls.__mro__[: cls.__mro__.index(base)] for name in vars(part)}
    code = sorted(name for name in own - CONSTRUCTION - ({"forward"} if alone else set()) if not name.startswith("__"))
    if code or "__getattr__" in own:
        return f"{kind} has code of its own: {', '.join(code) or 'its attributes'}"
    if {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}:
        return f"{kind} has more than a weight and a bias"
    if layer._state_dict_hooks or layer._state_dict_pre_hooks or layer._load_state_dict_pre_hooks:
        return "has hooks on its state_dict, which is another one once packed"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm changes rows as they are read"
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    return _why_not_dtype(weight)


def _why_not_dtype(weight: Tensor) -> str:
    if weight.dtype not in FLOATS:
        return (
            f"its weight is {str(weight.dtype).removeprefix('torch.')}; only float32, float16 and bfloat16 are packed"
        )
    return "" if weight.numel() else "its weight has no elements"


def matrix_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Views the layer's weight, or a tensor of its shape, as `[N, K]`; those of experts below one another."""
    if isinstance(layer, ExpertStack):
        return layer.rows(weight)
    if is_conv1d(layer):
        return weight.t()
    return weight.flatten(1)


def in_rows(layer: nn.Module, weight: PackedWeight) -> PackedWeight:
    """Reorders the rows of a packed `matrix_of` to the element order of the packed layer."""
    filter = layer.weight.shape[1:] if isinstance(layer, CONVS) else weight.shape[1:]
    return conv_rows(weight, tuple(filter))


def float_weight(layer: nn.Module, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantizes to the shape of the float layer's weight. weight: as `in_rows` gives it."""
    packed = packed_like(layer, weight)
    packed.dtype = dtype
    return packed.weight.contiguous()


def format_of(layer: nn.Module, weight: Tensor, scheme: Scheme) -> PackedFormat:
    """Returns the format that the layer's packed weight will have."""
    if not isinstance(layer, ExpertStack):
        return packed_format(matrix_of(layer, weight), scheme)
    formats = [packed_format(rows, scheme) for rows in matrix_of(layer, weight).chunk(layer.experts)]
    first, dtypes = formats[0], {format.scale_dtype for format in formats}
    return replace(
        first,
        shape=(first.shape[0] * layer.experts, first.shape[1]),
        scale_dtype=first.scale_dtype if len(dtypes) == 1 else "float32",
        divisors=first.divisors * layer.experts,
    )


def rounded(layer: nn.Module, weight: Tensor, scheme: Scheme) -> PackedWeight:
    """Rounds the layer's weight, or a tensor of its shape, to nearest; of experts each on its own."""
    rows = matrix_of(layer, weight)
    if isinstance(layer, ExpertStack):
        return stack_rows([round_to_nearest(own, scheme) for own in rows.chunk(layer.experts)])
    return in_rows(layer, round_to_nearest(rows, scheme))


def packed_like(layer: Any, weight: PackedWeight | Packed, act: str | None = None) -> Packed:
    """Makes the packed layer that replaces a float one, with the attributes that other code may read.

    Args:
        weight: as `in_rows` gives it, or the packed layer whose weight this one is to share.
        act: `int8@token` for a linear that rounds the rows it reads; None for floats.
    """
    dtype, bias = layer.weight.dtype, getattr(layer, "bias", None)
    if bias is not None and bias.is_inference():
        bias = bias.clone()  # of a model that was built in inference mode: gradients could not pass the layer
    new: Packed
    if isinstance(layer, nn.Embedding):
        new = PackedEmbedding(weight, layer.padding_idx, dtype)
    elif isinstance(layer, CONVS):
        new = PackedConv(weight, geometry_of(layer), layer.weight.shape[1:], bias, dtype)
        new.channels_last = is_channels_last(layer.weight)
    elif is_conv1d(layer):
        new = PackedConv1D(weight, bias, dtype)
    else:
        new = (PackedLinear if act is None else DynamicPackedLinear)(weight, bias, dtype)
    for key, value in layer.__dict__.items():
        if key not in _MODULE and not hasattr(new, key):
            new.__dict__[key] = value
    return new
