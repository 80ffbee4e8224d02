"""Plans which convolutions become adder layers, or why they stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gs_algos.adder.config import AdderConfig
from gs_algos.adder.layers import AdderLayer
from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.batches import refuse_empty
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import own_forward
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import Plan, PlanRow
from gs_algos.core.plan_settings import RowSettings
from gs_algos.fx.capture.capture import capture
from gs_algos.fx.consumers import EDGES
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.op_names import NOOPS
from gs_algos.fx.patterns import match
from gs_algos.quant.network.planning import keep_row, refused_rows

NORMS = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")
CONVS = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class AdderPlan(RowSettings):
    """Says how a convolution is swapped.

    Args:
        eta: of its gradient.
        int8: whether it is on a grid.
    """

    form: ClassVar[str] = "adder"

    eta: float
    int8: bool = False


def make_plan(name: str, config: AdderConfig, model: nn.Module, inputs: Inputs) -> Plan:
    """Decides for every convolution. The model stays as it is.

    Raises:
        ValueError: if the inputs hold no sample or do not run through the model, or a rule matches nothing.
    """
    refuse_empty(inputs, "Adder")
    graph = capture(model, *split_inputs(inputs))
    _, refusals = match(graph, model)
    refusals = [one for one in refusals if one.pattern == "conv_bn_act"]
    convs = {site: m for site, m in model.named_modules() if isinstance(m, CONVS)}
    settings = resolve(config.rules, convs, {"eta": config.eta}, config.who) if convs else {}
    weighted = {name for name, m in model.named_modules() if isinstance(m, CONVS | nn.Linear)}
    calls = [node.module for node in graph.nodes if node.module in weighted]
    refused = {row.site: row.reason for row in refused_rows(refusals, convs)}
    rows = []
    for site, conv in convs.items():
        chosen = settings[site]
        reason = refused.get(site, "") or why_kept(model, site, conv) or ("left by a rule" if chosen is None else "")
        reason = reason or _why_there(graph, site, calls)
        if reason or chosen is None:
            rows.append(keep_row(site, conv, reason))
            continue
        plan = AdderPlan(float(chosen["eta"]), config.int8)
        detail = f"gradient x {plan.eta:g} sqrt(numel) / norm, {'one 8-bit grid' if plan.int8 else 'floats'}"
        rows.append(PlanRow(site, type(conv).__name__, "add", detail, "", plan))
    return Plan(name, graph.tracer, tuple(rows), graph.notes)


def why_kept(model: nn.Module, site: str, conv: Any) -> str:
    """Says why a convolution cannot be an adder layer; "" if it can."""
    if isinstance(conv, AdderLayer):
        return "is an adder layer already"
    if not isinstance(conv, nn.Conv2d):
        return f"is a {type(conv).__name__}, and only two-dimensional convolutions have an adder form"
    if conv.groups > 1:
        return f"has {conv.groups} groups, and adder layers have none"
    if conv.padding_mode != "zeros":
        return f"is padded by {conv.padding_mode}, and adder layers only by zeros"
    if is_compiled(model, site):
        return "is wrapped by torch.compile, which would call it on; compile after convert"
    return own_forward(conv, nn.Conv2d)


def _why_there(graph: SiteGraph, site: str, calls: list[Any]) -> str:
    """Says why a convolution stays by its place in the network."""
    if not calls or site not in calls:
        return "did not run on the example inputs in eval mode"
    if site == calls[0]:
        return "is the stem"
    if site == calls[-1]:
        return "is the classifier"
    if graph.tracer not in EDGES:
        return f"what follows is not known: the graph was read by {graph.tracer}, and a norm must follow"
    return _why_unnormed(graph, site)


def _why_unnormed(graph: SiteGraph, site: str) -> str:
    """Says that no norm follows a layer; "" if one does and nothing else reads the layer."""
    (node,) = graph.calls(site)
    while True:
        users = [graph.nodes[i] for i in node.users]
        if len(users) == 1 and users[0].op in NOOPS:
            node = users[0]
            continue
        if users and all(user.op in NORMS for user in users):
            return ""
        reader = ", ".join(user.module or user.op for user in users) or "nothing"
        return f"no norm follows, but {reader}: sums of differences are large and below 0; put a batch norm behind it"
