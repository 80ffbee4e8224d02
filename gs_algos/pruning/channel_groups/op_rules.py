"""Rules of the ATen operations: where the labels of their inputs go. A rule returns the value of each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gs_algos.pruning.channel_groups.labels import NOTHING, Value, compact, varying
from gs_algos.pruning.channel_groups.op_rules_elementwise import combine
from gs_algos.pruning.channel_groups.op_rules_products import attention, convolution, embedding, linear, product
from gs_algos.pruning.channel_groups.trace import ChannelFlow, OpCall, OpRule, ReshapedChannels
from gs_kernels.runtime.torch_private import tree_leaves

POINTWISE = (
    *("hardswish", "_to_copy", "copy", "native_dropout", "_fused_dropout", "_prelu_kernel", "log_sigmoid_forward"),
    *("lift_fresh", "bernoulli", "uniform", "fill", "zero"),
    *(f"{kind}_like" for kind in ("ones", "zeros", "empty", "full", "rand", "randn")),
)
RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")
# one source, rearranged: run on the labels
REARRANGEMENTS = ("repeat", "index_select", "roll", "flip", "index", "repeat_interleave", "lift")
REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "median", "prod", "any", "all", "count_nonzero"),
    *("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp"),
)
# mix along `dim`
ALONG = ("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "softmax", "log_softmax")
UPSAMPLES = (("upsample_", "", ""), ("_upsample_", "_exact", "_aa"))
PLANES = {  # work on the trailing dimensions, each channel by itself
    **{f"{kind}_pool{n}d": n for kind in ("avg", "_adaptive_avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (2, 3)},
    **{f"{kind}_pad{n}d": n for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **{f"{head}nearest{exact}{n}d": n for head, exact, _ in UPSAMPLES for n in (1, 2, 3)},
    **{f"{head}{kind}2d{tail}": 2 for head, _, tail in UPSAMPLES for kind in ("bilinear", "bicubic")},
    **{"upsample_linear1d": 1, "upsample_trilinear3d": 3, "tril": 2, "triu": 2},
}
# only the data type and the device of the input matter
SHAPES = ("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "empty_strided", "_assert_async")


def rule_of(call: OpCall) -> OpRule | None:
    """Returns the rule of an operation; None if there is none."""
    if call.op in RULES:
        return RULES[call.op]
    if torch.Tag.pointwise in call.func.tags:
        return pointwise
    if "batch_norm" in call.op:
        return batch_norm
    if call.op.startswith("_scaled_dot_product"):
        return attention
    returns = call.func._schema.returns
    if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return rearrange
    return None


def pointwise(flow: ChannelFlow, call: OpCall) -> list[Value]:
    values = [flow.value(t) for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    return [combine(flow, values, tuple(out.shape), flow.where(call)) for out in call.outputs]


def reshape(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value, new = flow.value(call.args[0]), tuple(call.outputs[0].shape)
    return [Value(new, tuple(_reshaped(flow, f, value.shape, new) for f in value.fields), value.weights)]


def _reshaped(flow: ChannelFlow, labels: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    full, sizes, touched = list(labels.shape), list(new), set()
    for (i0, i1), (j0, j1) in _blocks(old, new):
        inside = {d for d in range(i0, i1) if labels.size(d) > 1}
        if not inside:
            sizes[j0:j1] = [1] * (j1 - j0)
            full[i0:i1] = [1] * (i1 - i0)
            continue
        if len(inside) > 1:
            flow.boxes.append(ReshapedChannels(labels.squeeze(), flow.scope))
        full[i0:i1] = old[i0:i1]
        touched |= set(range(j0, j1))
    moved = compact(labels.expand(full).reshape(sizes))
    if len(varying(moved) & touched) > 1:
        flow.boxes.append(ReshapedChannels(moved.squeeze(), flow.scope))
    return moved


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs the runs of dimensions of two shapes that hold the same elements: ((first, end), (first, end)) each."""
    blocks: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        i0, j0, a, b = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        blocks.append(((i0, i), (j0, j)))
    if blocks:  # dimensions of size 1 that are left over
        (i0, _), (j0, _) = blocks[-1]
        blocks[-1] = ((i0, len(old)), (j0, len(new)))
    return blocks


def rearrange(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Runs a view or a copy that only rearranges on the labels themselves."""
    value = flow.value(call.args[0])
    others = [flow.value(t) for t in tree_leaves((call.args[1:], call.kwargs)) if isinstance(t, Tensor)]
    for other in others:
        for labels in other.fields:
            flow.atoms.freeze(labels, f"is an index of {flow.where(call)}")
    fields: list[list[Tensor]] = [[] for _ in call.outputs]
    for labels in value.fields:
        result = call.func(labels.expand(value.shape), *call.args[1:], **call.kwargs)
        for mine, part in zip(fields, tree_leaves(result), strict=True):
            part = compact(part)
            mine += [part] if varying(part) else []
    return [Value(tuple(out.shape), tuple(f), value.weights) for out, f in zip(call.outputs, fields, strict=True)]


def as_strided(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value = flow.value(call.args[0])
    if tuple(call.argument("size")) == value.shape:
        return [value]
    for labels in value.fields:
        flow.atoms.freeze(labels, f"no rule for a new shape in {flow.where(call)}")
    return []


def pad(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Pads the labels of `constant_pad_nd` with NOTHING: no layer makes the padding."""
    value, amounts = flow.value(call.args[0]), call.argument("pad")
    fields = []
    for labels in value.fields:
        widths = [n for d, n in _pairs(amounts, labels.dim()) if labels.size(d) > 1]
        if any(low < 0 or high < 0 for low, high in widths):
            flow.atoms.freeze(labels, f"is cropped by {flow.where(call)}")
            continue
        kept = [n if labels.size(d) > 1 else (0, 0) for d, n in _pairs(amounts, labels.dim())]
        flat = [n for low_high in kept for n in low_high]
        fields.append(torch.nn.functional.pad(labels, flat, value=NOTHING))
    return [Value(tuple(call.outputs[0].shape), tuple(fields))]


def _pairs(amounts: Sequence[int], rank: int) -> list[tuple[int, tuple[int, int]]]:
    """Lists (dimension, (before, after)) from the last dimension to the first, as `F.pad` takes them."""
    return [(rank - 1 - i, (int(amounts[2 * i]), int(amounts[2 * i + 1]))) for i in range(len(amounts) // 2)]


def cat(flow: ChannelFlow, call: OpCall) -> list[Value]:
    values = [flow.value(t) for t in call.args[0]]
    values = [v for v in values if v.shape != (0,)]
    dim = call.argument("dim", 0) % len(values[0].shape)
    return [_cat(flow, values, dim, tuple(call.outputs[0].shape), flow.where(call))]


def stack(flow: ChannelFlow, call: OpCall) -> list[Value]:
    shape = tuple(call.outputs[0].shape)
    dim = call.argument("dim", 0) % len(shape)
    values = [flow.value(t) for t in call.args[0]]
    wide = [
        Value((*v.shape[:dim], 1, *v.shape[dim:]), tuple(f.unsqueeze(dim) for f in v.fields), v.weights) for v in values
    ]
    return [_cat(flow, wide, dim, shape, flow.where(call))]


def _cat(flow: ChannelFlow, values: list[Value], dim: int, shape: tuple[int, ...], where: str) -> Value:
    joined = [[f for f in v.fields if f.size(dim) > 1] for v in values]
    across = [
        Value((*v.shape[:dim], 1, *v.shape[dim + 1 :]), tuple(f for f in v.fields if f.size(dim) == 1)) for v in values
    ]
    beside = combine(flow, across, (*shape[:dim], 1, *shape[dim + 1 :]), where)
    fields = list(beside.fields)
    kinds = {varying(f) for found in joined for f in found}
    if len(kinds) == 1:
        sizes = [shape[d] if d in next(iter(kinds)) else 1 for d in range(len(shape))]
        parts = []
        for value, found in zip(values, joined, strict=True):
            sizes[dim] = value.shape[dim]
            parts.append(found[0].expand(sizes) if found else torch.full(sizes, NOTHING))
        fields.append(compact(torch.cat(parts, dim)))
        if len(varying(fields[-1])) > 1:
            flow.boxes.append(ReshapedChannels(fields[-1].squeeze(), flow.scope))
    else:
        for labels in (f for found in joined for f in found):
            flow.atoms.freeze(labels, f"is joined with channels of another layout in {where}")
    return Value(shape, flow.atoms.settle(fields, f"is joined in {where}"), all(v.weights for v in values))


def planes(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value = flow.value(call.args[0])
    rank = len(value.shape)
    last = range(rank - PLANES[call.op], rank)
    rests = [flow.atoms.whole(f, last, f"is a spatial axis of {flow.where(call)}") for f in value.fields]
    return [Value(tuple(out.shape), tuple(f for f in rests if f is not None)) for out in call.outputs]


def reduction(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value = flow.value(call.args[0])
    rank, given = len(value.shape), call.argument("dim", [])
    dims = {d % rank for d in (given if isinstance(given, (list, tuple)) else [given])} or set(range(rank))
    rests = [flow.atoms.whole(f, dims, f"is mixed by {flow.where(call)}") for f in value.fields]
    fields = [f for f in rests if f is not None]
    if not call.argument("keepdim", False):
        fields = [f.squeeze(tuple(dims)) for f in fields]
    return [Value(tuple(out.shape), tuple(fields)) for out in call.outputs]


def along(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value = flow.value(call.args[0])
    dim = call.argument("dim", -1) % len(value.shape)
    if call.op.endswith("softmax"):
        flow.heads += [f.flatten() for f in value.fields if varying(f) - {dim}]
    rests = [flow.atoms.whole(f, [dim], f"is mixed by {flow.where(call)}") for f in value.fields]
    return [Value(tuple(out.shape), tuple(f for f in rests if f is not None)) for out in call.outputs]


def shape_only(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Drops the labels: the output has no channels of the input."""
    return []


def batch_norm(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value, *members = (flow.value(t) for t in call.args[:5])
    fields = []
    for labels in value.fields:
        rest = labels
        if labels.size(1) > 1:
            rest = flow.atoms.whole(labels, varying(labels) - {1}, f"is mixed by {flow.where(call)}")  # type: ignore[assignment]
            for member in members:
                for own in member.fields:
                    flow.atoms.unite(rest.flatten(), own.flatten(), f"is padded in front of {flow.where(call)}")
            if members[0].fields:
                flow.norms.append((rest.flatten(), members[0].fields[0].flatten()))
        else:
            rest = flow.atoms.whole(labels, varying(labels), f"is mixed by {flow.where(call)}")  # type: ignore[assignment]
        fields += [] if rest is None else [rest]
    return [Value(tuple(call.outputs[0].shape), tuple(fields))]


def layer_norm(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Ties the trailing dimensions, which `native_layer_norm` and `_fused_rms_norm` normalize together."""
    value = flow.value(call.args[0])
    rank = len(value.shape)
    dims = range(rank - len(call.argument("normalized_shape")), rank)
    rests = [flow.atoms.whole(f, dims, f"is normalized together by {flow.where(call)}") for f in value.fields]
    return [Value(value.shape, tuple(f for f in rests if f is not None))]


def group_norm(flow: ChannelFlow, call: OpCall) -> list[Value]:
    value = flow.value(call.args[0])
    dims = range(1, len(value.shape))
    rests = [flow.atoms.whole(f, dims, f"is normalized in groups by {flow.where(call)}") for f in value.fields]
    return [Value(value.shape, tuple(f for f in rests if f is not None))]


RULES: dict[str, Any] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(REARRANGEMENTS, rearrange),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(ALONG, along),
    **dict.fromkeys(PLANES, planes),
    **dict.fromkeys(SHAPES, shape_only),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), product),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    "linear": linear,
    "convolution": convolution,
    "embedding": embedding,
    "constant_pad_nd": pad,
    "cat": cat,
    "stack": stack,
    "as_strided": as_strided,
}
