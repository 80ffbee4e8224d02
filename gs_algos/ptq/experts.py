"""Opens stacked experts while a network is calibrated: each becomes a module of linears, which is rounded as any other.

Their weights are views of the stacks, so nothing is copied, and closing gives packed stacks, or the float ones back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import set_module
from gs_algos.core.plan import PlanRow
from gs_algos.ptq.weights import WeightPlan
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.packed.experts import ExpertStack, PackedExperts, is_experts, put_stack, stacks_of
from gs_algos.quant.packed.linear import PackedLinear
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels.pack.rows import stack_rows


class OpenExpert(nn.Module):
    """Computes one expert; its linears look into the stacks.

    Args:
        experts: what holds the stacks.
        number: of the expert.
    """

    def __init__(self, experts: nn.Module, number: int) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple: it is no child
        for part, stack in stacks_of(experts).items():
            weight, bias = stack[number].detach(), experts._parameters.get(f"{part}_bias")
            rows = weight.t() if ExpertStack(experts, part).transposed else weight
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(rows, requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias[number].detach(), requires_grad=False)
            self.add_module(part, linear)

    def forward(self, x: Tensor) -> Tensor:
        experts: Any = self._experts[0]
        parts: Any = self._modules
        if "up_proj" in parts:
            return parts["down_proj"](experts.act_fn(parts["up_proj"](x)))  # type: ignore[no-any-return]
        h = parts["gate_up_proj"](x)
        if hasattr(experts, "_apply_gate"):
            return parts["down_proj"](experts._apply_gate(h))  # type: ignore[no-any-return]
        gate, up = h.chunk(2, dim=-1)
        return parts["down_proj"](experts.act_fn(gate) * up)  # type: ignore[no-any-return]


class OpenExperts(nn.ModuleList, OffFastPath):
    """Computes the experts of a mixture one by one, each on its own tokens; stands where `closed` stood."""

    def __init__(self, experts: nn.Module) -> None:
        count = next(iter(stacks_of(experts).values())).shape[0]
        super().__init__(OpenExpert(experts, number) for number in range(count))
        self._closed = (experts,)
        self.train(experts.training)

    @property
    def closed(self) -> nn.Module:
        return self._closed[0]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(-1, hidden_states.shape[-1]).chunk(len(self))
            return torch.cat([expert(own) for expert, own in zip(self, rows, strict=True)])
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if len(token):
                y = expert(hidden_states[token]) * top_k_weights[token, place, None]
                out = out.index_add(0, token, y.to(out.dtype))
        return out


def _openable(model: nn.Module) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if name and is_experts(module)}
    return {
        name: module
        for name, module in found.items()
        if not isinstance(module, PackedExperts) and not getattr(module, "has_post_expert_norm", False)
    }


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Opens all experts inside, for whoever looks at the layers: nothing of the model changes."""
    slots = []
    for experts in _openable(model).values():
        new = OpenExperts(experts)
        for parent in model.modules():
            slots += [(parent, key, experts, new) for key, child in parent._modules.items() if child is experts]
    for parent, key, _, new in slots:
        parent._modules[key] = new
    try:
        yield
    finally:
        for parent, key, experts, _ in slots:
            parent._modules[key] = experts


def open_experts(model: nn.Module, sites: Iterable[str]) -> None:
    """Opens the experts in which a site is."""
    names = tuple(sites)
    for name, experts in _openable(model).items():
        if any(site.startswith(f"{name}.") for site in names):
            set_module(model, name, OpenExperts(experts))


def in_experts(model: nn.Module, site: str) -> bool:
    """Says whether a layer is one of open experts, whose packed form reads floats."""
    owner = model.get_submodule(site.rpartition(".")[0].rpartition(".")[0])
    return isinstance(owner, OpenExperts)


def refuse_different(rows: Sequence[PlanRow], model: nn.Module, who: str) -> None:
    """Raises unless the experts of a stack have one scheme: they are multiplied in one product.

    Raises:
        ValueError: so.
    """
    kinds: dict[tuple[str, str], dict[str | None, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, OpenExperts):
            for row in rows:
                number, _, part = row.site.removeprefix(f"{name}.").partition(".")
                if row.site.startswith(f"{name}.") and number.isdigit():
                    scheme = None if row.settings is None else row.settings.weight
                    kinds.setdefault((name, part), {}).setdefault(scheme, row.site)
    for (name, part), schemes in kinds.items():
        if len(schemes) > 1:
            got = " and ".join(f"{scheme or 'float'} for {site}" for scheme, site in schemes.items())
            raise ValueError(f"{who}: experts of {name} must have one scheme for their {part}, got {got}; rule all")


def close_experts(model: nn.Module, rows: Sequence[PlanRow]) -> list[PlanRow]:
    """Puts packed linears of open experts together to stacks; returns the rows, one for each stack."""
    merged: dict[str, PlanRow] = {}
    replaced: set[str] = set()
    for name, module in list(model.named_modules()):
        if not isinstance(module, OpenExperts):
            continue
        set_module(model, name, module.closed)
        for part in list(stacks_of(module.closed)):
            linears: list[Any] = [expert._modules[part] for expert in module]
            sites = [f"{name}.{number}.{part}" for number in range(len(linears))]
            own = [row for row in rows if row.site in set(sites)]
            replaced |= {row.site for row in own}
            stack, kind = f"{name}.{part}", type(module.closed).__name__
            if not isinstance(linears[0], PackedLinear):
                reason = own[0].reason if own else ""
                merged[own[0].site] = PlanRow(stack, kind, "keep", reason=reason, settings=WeightPlan((stack,)))
                continue
            weight = stack_rows([linear.packed for linear in linears])
            put_stack(model, stack, weight).signs = linears[0].signs
            settings: Any = own[0].settings
            plan = replace(settings, names=(stack,), format=PackedFormat.of(weight))
            merged[own[0].site] = replace(own[0], site=stack, kind=kind, settings=plan)
    return [merged.get(row.site, row) for row in rows if row.site in merged or row.site not in replaced]
