"""Rules of the operations that multiply channels: matrix products, convolutions, attention, embeddings."""

from __future__ import annotations

import math

from torch import Tensor

from gs_algos.pruning.channel_groups.labels import Value, varying
from gs_algos.pruning.channel_groups.op_rules_elementwise import combine
from gs_algos.pruning.channel_groups.trace import ChannelFlow, Cost, OpCall


def embedding(flow: ChannelFlow, call: OpCall) -> list[Value]:
    weight, out = flow.value(call.args[0]), call.outputs[0]
    fields = [f.view(*[1] * (out.dim() - 1), -1) for f in weight.fields if f.size(1) > 1]
    flow.produced += [f.flatten() for f in fields]
    return [Value(tuple(out.shape), tuple(fields))]


def contract(flow: ChannelFlow, a: Value, b: Value, where: str) -> Value:
    """Follows `a [..., k] @ b [..., k, n]`: channels that are multiplied together go together, the others come out."""
    out_shape = (*a.shape[:-1], b.shape[-1])
    rank, k = len(out_shape), b.shape[-2]
    reason = f"is multiplied with something of fixed size in {where}"
    inner_a = [f.movedim(-1, 0) for f in a.fields if f.size(-1) > 1]  # [k, ...]
    inner_b = [f.movedim(-2, 0) for f in b.fields if f.size(-2) > 1]
    inner_b = [f.view(f.size(0), *[1] * (rank - f.dim()), *f.shape[1:]) for f in inner_b]
    fields: list[Tensor] = []
    factors: list[Tensor] = []
    matched: set[int] = set()
    for f in inner_a:
        partner = next((j for j, g in enumerate(inner_b) if g.shape == f.shape), None)
        if partner is not None:
            matched.add(partner)
            flow.atoms.unite(f, inner_b[partner], reason)
        if partner is not None and varying(f) == {0}:
            factors.append(f.flatten())
            continue
        rest = flow.atoms.whole(f, [0], reason)
        fields += [] if rest is None else [rest.movedim(0, -1)]
    for j, g in enumerate(inner_b):
        if j not in matched and (rest := flow.atoms.whole(g, [0], reason)) is not None:
            fields.append(rest.movedim(0, -2))
    fields += [f for f in a.fields if f.size(-1) == 1]
    outer = [f.view(*[1] * (rank - f.dim()), *f.shape) for f in b.fields if f.size(-2) == 1]
    fields += outer
    if b.weights and not a.weights:
        flow.produced += [f.flatten() for f in outer if f.size(-1) > 1]
    elif a.weights and not b.weights:
        flow.produced += [f.flatten() for f in a.fields if f.size(-1) == 1]
    settled = flow.atoms.settle(fields, reason)
    if not (a.weights and b.weights):
        flow.costs.append(Cost(math.prod(out_shape) * k, (*factors, *(f.flatten() for f in settled))))
    return Value(out_shape, settled, a.weights and b.weights)


def product(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Follows mm and bmm, and with a summand in front addmm and baddbmm."""
    *summand, a, b = (flow.value(t) for t in call.args[: 3 if "add" in call.op else 2])
    result = contract(flow, a, b, flow.where(call))
    return [combine(flow, [result, *summand], result.shape, flow.where(call)) if summand else result]


def linear(flow: ChannelFlow, call: OpCall) -> list[Value]:
    x, weight, bias = (flow.value(call.argument(name)) for name in ("input", "weight", "bias"))
    turned = Value(weight.shape[::-1], tuple(f.t() for f in weight.fields), weight.weights)
    result = contract(flow, x, turned, flow.where(call))
    return [combine(flow, [result, bias], result.shape, flow.where(call)) if bias.shape else result]


def attention(flow: ChannelFlow, call: OpCall) -> list[Value]:
    """Follows softmax(q k^T) v over [..., T, d]; with fewer k and v heads than q heads, each serves several."""
    q, k, v = (flow.value(t) for t in call.args[:3])
    where = flow.where(call)
    k, v = _shared_heads(k, q), _shared_heads(v, q)
    turned = Value((*k.shape[:-2], k.shape[-1], k.shape[-2]), tuple(f.transpose(-1, -2) for f in k.fields))
    scores = contract(flow, q, turned, where)
    rests = [flow.atoms.whole(f, [len(scores.shape) - 1], f"is mixed by {where}") for f in scores.fields]
    scores = Value(scores.shape, tuple(f for f in rests if f is not None))
    flow.heads += [f.flatten() for f in scores.fields if varying(f) - {len(scores.shape) - 1}]
    bias = flow.value(call.argument("attn_mask", call.argument("attn_bias")))
    scores = combine(flow, [scores, bias], scores.shape, where)
    return [contract(flow, scores, v, where)]


def _shared_heads(k: Value, q: Value) -> Value:
    times = q.shape[-3] // k.shape[-3] if len(k.shape) > 2 else 1
    if times == 1:
        return k
    fields = [f.repeat_interleave(times, -3) if f.size(-3) > 1 else f for f in k.fields]
    return Value((*k.shape[:-3], q.shape[-3], *k.shape[-2:]), tuple(fields))


def convolution(flow: ChannelFlow, call: OpCall) -> list[Value]:
    x, weight, bias = (flow.value(t) for t in call.args[:3])
    where, out = flow.where(call), tuple(call.outputs[0].shape)
    transposed, groups = call.argument("transposed", False), call.argument("groups", 1)
    source, fields = _conv_input(flow, x, where)
    w_in, w_out = (_axis(weight, d) for d in ((0, 1) if transposed else (1, 0)))
    depthwise = groups > 1 and weight.shape[1] == 1 and (weight.shape[0] == groups or not transposed)
    if depthwise:
        w_out = _axis(weight, 0)
        if source is not None and w_out is not None:
            flow.atoms.unite(source[:, None], w_out.view(source.numel(), -1), f"is padded in front of {where}")
        elif w_out is not None:
            flow.atoms.freeze(w_out, f"works on channels of fixed number in {where}")
    elif groups > 1 and transposed:
        for labels in (source, w_in, w_out):
            if labels is not None:
                flow.atoms.freeze(labels, f"no rule for a grouped transposed {where}")
        w_out = None
    else:
        _conv_channels(flow, (source, w_in, w_out), groups, where)
    factors = tuple(f for f in ((w_out,) if depthwise else (w_in, w_out)) if f is not None)
    positions = math.prod(x.shape if transposed else out)
    flow.costs.append(Cost(positions * math.prod(weight.shape[1:]), factors))
    if w_out is not None:
        fields.append(w_out.view(1, -1, *[1] * (len(out) - 2)))
        for own in bias.fields:
            flow.atoms.unite(w_out, own.flatten(), where)
    return [Value(out, tuple(fields))]


def _conv_input(flow: ChannelFlow, x: Value, where: str) -> tuple[Tensor | None, list[Tensor]]:
    """Returns (labels of the input channels, fields along the batch, which pass)."""
    source, passing = None, []
    for labels in x.fields:
        rest = flow.atoms.whole(labels, varying(labels) - {0, 1}, f"is a spatial axis of {where}")
        if rest is not None and rest.size(1) > 1:
            rest = flow.atoms.whole(rest, [0], f"is mixed by {where}")
            source = None if rest is None else rest.flatten()
        elif rest is not None:
            passing.append(rest)
    return source, passing


def _axis(weight: Value, dim: int) -> Tensor | None:
    return next((f.flatten() for f in weight.fields if varying(f) == {dim}), None)


def _conv_channels(flow: ChannelFlow, labels: tuple[Tensor | None, ...], groups: int, where: str) -> None:
    """Ties the channels of a conv that mixes them. With groups, the same ones go from every group."""
    source, w_in, w_out = labels
    if groups > 1:
        for wide in (source, w_out):
            if wide is not None:
                rows = wide.view(groups, -1)
                flow.atoms.unite(rows, rows[:1], where)
        source = None if source is None else source.view(groups, -1)[0]
    if source is not None and w_in is not None:
        flow.atoms.unite(source, w_in, f"is padded in front of {where}")
    elif source is not None:
        flow.atoms.freeze(source, f"is read with a computed weight by {where}")
    if w_out is not None:
        flow.produced.append(w_out)
