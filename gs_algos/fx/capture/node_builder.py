"""Makes the nodes of a graph from drafts: one node for each call of a leaf module whose class says what it computes.

A module with a forward of its own that is one known op gets that op, and its name, too.
"""

from __future__ import annotations

from torch import nn

from gs_algos.core.modules import get_module
from gs_algos.fx import op_names
from gs_algos.fx.capture.graph_reader import ModuleNames, NodeDraft, join
from gs_algos.fx.graph import Node
from gs_kernels.runtime.torch_private import _BatchNorm


def assemble(drafts: list[NodeDraft], names: ModuleNames) -> tuple[Node, ...]:
    """Builds the nodes of a graph in execution order; drafts of several graphs are joined first, by `concatenate`."""
    calls: dict[tuple[str, ...], list[int]] = {}
    for i, draft in enumerate(drafts):
        if draft.call is not None and draft.module is None:
            calls.setdefault(draft.call, []).append(i)
    home = list(range(len(drafts)))  # draft -> the draft that stands for it
    for members in calls.values():
        module = get_module(names.model, drafts[members[0]].scope)
        if op_names.is_plain(module):
            _collapse(drafts, members, names, home)
        elif len(members) == 1 and _is_one_op(drafts[members[0]], module):
            drafts[members[0]].module = drafts[members[0]].scope
    kept = [i for i, j in enumerate(home) if i == j]
    place = {old: new for new, old in enumerate(kept)}
    inputs = [tuple(place[home[j]] for j in drafts[i].inputs) for i in kept]
    users: list[list[int]] = [[] for _ in kept]
    for reader, sources in enumerate(inputs):
        for source in dict.fromkeys(sources):
            users[source].append(reader)
    return tuple(
        Node(
            index=new,
            op=drafts[i].op,
            inputs=inputs[new],
            users=tuple(users[new]),
            module=drafts[i].module,
            scope=drafts[i].scope,
            weight=drafts[i].weight,
            target=drafts[i].target,
            reads=drafts[i].reads,
            shape=drafts[i].shape,
        )
        for new, i in enumerate(kept)
    )


def concatenate(parts: list[list[NodeDraft]]) -> list[NodeDraft]:
    """Joins the drafts of several graphs one after the other; calls of different parts stay apart."""
    joined: list[NodeDraft] = []
    for number, part in enumerate(parts):
        offset = len(joined)
        for draft in part:
            draft.inputs = [i + offset for i in draft.inputs]
            draft.call = None if draft.call is None else (f"part{number}", *draft.call)
        joined += part
    return joined


def _collapse(drafts: list[NodeDraft], members: list[int], names: ModuleNames, home: list[int]) -> None:
    """Merges the drafts of one call of a plain module, e.g. `pad` and `conv2d` of a Conv2d with circular padding."""
    last, inside = drafts[members[-1]], set(members)
    sources = [j for i in members for j in drafts[i].inputs if j not in inside]
    last.inputs = list(dict.fromkeys(sources)) if len(members) > 1 else sources
    last.op = op_names.op_of_module(get_module(names.model, last.scope))
    last.module, last.weight = last.scope, names.weight_of(last.scope)
    last.reads = tuple(dict.fromkeys(name for i in members for name in drafts[i].reads))
    for i in members:
        home[i] = members[-1]


def _is_one_op(draft: NodeDraft, module: nn.Module) -> bool:
    """Says whether a module with its own forward is one activation, F.linear or F.batch_norm on its own parameters.

    A batch norm may have children that run behind it (timm's BatchNormAct2d): they are nodes of their own.
    """
    own = tuple(join(draft.scope, key) for key, found in module._parameters.items() if found is not None)
    if isinstance(module, _BatchNorm):
        return draft.op == "batch_norm" and set(draft.reads) == set(own)
    if module._modules or _looks_at_training(module):
        return False
    if draft.op == "linear":
        return isinstance(module, nn.Linear) and draft.weight == own[0] and set(draft.reads) == set(own)
    return draft.op in op_names.ACTIVATIONS and not own


def _looks_at_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is None or "forward" in module.__dict__ or "training" in code.co_names
