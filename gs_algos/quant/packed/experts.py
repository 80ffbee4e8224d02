"""Defines the experts of a mixture with packed weights, and finds the float ones that they stand for.

Transformers keeps the experts of a layer as two stacks, `gate_up_proj [E, 2 * I, H]` and `down_proj [E, H, I]`, or
transposed, in one module. Which form they have it says by attributes (`transformers.integrations.moe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import get_module, parent_name, set_module
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.packed.module import Packed, autocast_dtype
from gs_kernels import PackedWeight, dequantize_packed, qmatmul_grouped

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
SAYS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what experts say of them in Transformers 5.19
EQUAL = "Llama4TextExperts"  # says nothing of itself: transposed, and every expert gets the same number of rows


def is_experts(module: nn.Module) -> bool:
    """Says whether a module holds the experts of a mixture, of the forms that are known."""
    if isinstance(module, PackedExperts):
        return True
    # what an experts interface chooses the forward of is wrapped; a subclass with a forward of its own is not
    says = all(hasattr(module, name) for name in SAYS) and hasattr(type(module).forward, "__wrapped__")
    known = "forward" not in module.__dict__ and (says or type(module).__name__ == EQUAL)
    return known and bool(stacks_of(module)) and all(own in _parts(module) for own in module._parameters)


def _parts(module: nn.Module) -> set[str]:
    return {part for name in PROJECTIONS for part in (name, f"{name}_bias")}


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the stacks of float weights that a module holds, `[E, N, K]` or `[E, K, N]`."""
    held = {name: module._parameters.get(name) for name in PROJECTIONS}
    return {name: stack for name, stack in held.items() if stack is not None and stack.dim() == 3}


class ExpertStack(nn.Module):
    """Stands for one stack of float weights where a layer with a `weight` is expected: it is part of no model.

    weight: the live parameter.
    """

    weight: nn.Parameter
    transposed: bool

    def __init__(self, owner: nn.Module, part: str) -> None:
        super().__init__()
        self.weight = owner._parameters[part]  # type: ignore[assignment]
        if isinstance(owner, PackedExperts):
            self.transposed, self.kind = owner.transposed, owner._kind.__name__
        else:
            self.transposed = type(owner).__name__ == EQUAL or bool(getattr(owner, "is_transposed", False))
            self.kind = type(owner).__name__
        self.experts = self.weight.shape[0]

    def rows(self, weight: Tensor) -> Tensor:
        """Views a tensor of the stack's shape as `[E * N, K]`."""
        return (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)


def stack_at(model: nn.Module, name: str) -> ExpertStack | None:
    """Returns the stack of experts at the qualified name of its parameter; None if there is none."""
    owner_name, _, part = name.rpartition(".")
    modules = dict(model.named_modules(remove_duplicate=False)) if part in PROJECTIONS else {}
    owner = modules.get(owner_name)
    if owner is None or not is_experts(owner) or part not in stacks_of(owner):
        return None
    return ExpertStack(owner, part)


class PackedStack(Packed):
    """Multiplies rows, sorted by expert, with the packed weights of experts: `[E * N, K]`.

    Args:
        weight: packed, or the stack that this one is tied to.
        experts: E.
        transposed: whether the float stack was `[E, K, N]`, as `.weight` is then.
        dtype: of `.weight`.
    """

    def __init__(self, weight: PackedWeight | Packed, experts: int, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.experts, self.transposed = experts, transposed

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized stack, made anew at each access."""
        stack = dequantize_packed(self.packed, self.dtype).view(self.experts, -1, self.shape[1])
        return stack.transpose(1, 2) if self.transposed else stack

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = autocast_dtype(x)
        return qmatmul_grouped(x if dtype is None else x.to(dtype), self.packed, offsets, bias)

    def extra_repr(self) -> str:
        n, k = self.shape[0] // self.experts, self.shape[1]
        return f"experts={self.experts}, in_features={k}, out_features={n}, {super().extra_repr()}"


class PackedExperts(nn.Module, OffFastPath):
    """Computes what the experts of a mixture compute, with packed stacks where it has them, in one product a stack.

    Args:
        experts: the float ones, whose attributes, biases and activation this module takes over.

    Tokens are sorted by the expert that they go to. Results of a token's experts are weighted and added as
    `grouped_mm_experts_forward` of Transformers does, so outputs are its outputs.
    """

    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    transposed: bool

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        keep = {*nn.Module().__dict__, "_compiled_call_impl"}
        self.__dict__.update({key: value for key, value in experts.__dict__.items() if key not in keep})
        self._parameters.update(experts._parameters)
        self._modules.update(experts._modules)
        self._kind = type(experts)
        self.count = next(iter(stacks_of(experts).values())).shape[0]
        self.transposed = ExpertStack(experts, next(iter(stacks_of(experts)))).transposed
        self._is_hf_initialized = True  # no values to draw for what a checkpoint lacks

    def put(self, part: str, stack: PackedStack) -> None:
        """Puts a packed stack in the place of the float one."""
        self._parameters.pop(part, None)
        self._modules[part] = stack

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            each = rows.shape[0] // self.count
            return self.products(rows, torch.arange(1, self.count + 1, device=rows.device) * each)
        return weighted_sums(hidden_states, top_k_index, top_k_weights, self.count, self.products)

    def products(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Computes the outputs of rows `[M, H]`, sorted by expert, not weighted."""
        gated = getattr(self, "has_gate", True)
        h = self._multiply("gate_up_proj" if gated else "up_proj", x, offsets)
        h = self._gate(h) if gated else self.act_fn(h)
        y = self._multiply("down_proj", h, offsets)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _gate(self, h: Tensor) -> Tensor:
        own: Any = getattr(self._kind, "_apply_gate", None)
        if own is not None:
            return own(self, h)  # type: ignore[no-any-return]
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _multiply(self, part: str, x: Tensor, offsets: Tensor) -> Tensor:
        bias: Any = self._parameters.get(f"{part}_bias")
        stack = self._modules.get(part)
        if stack is not None:
            return stack(x, offsets, None if bias is None else bias.reshape(-1))  # type: ignore[no-any-return]
        weight: Any = self._parameters[part]
        w = weight if self.transposed else weight.transpose(1, 2)
        ends = [0, *offsets.tolist()]
        rows = [x[ends[e] : ends[e + 1]] @ w[e] + (0 if bias is None else bias[e]) for e in range(self.count)]
        return torch.cat([*rows, x.new_zeros(x.shape[0] - ends[-1], w.shape[2])])

    def extra_repr(self) -> str:
        return f"experts={self.count}, of {self._kind.__name__}"


def weighted_sums(
    x: Tensor, ids: Tensor, weights: Tensor, count: int, products: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Adds the weighted outputs of each token's experts, in the order of `grouped_mm_experts_forward` of Transformers.

    Args:
        x: `[M, H]`, the tokens.
        ids: `[M, k]` integers, the experts of each token; one of `count` or more is none.
        weights: `[M, k]`, of their outputs.
        products: of rows `[M * k, H]`, sorted by expert, and offsets `[count]`, as `qmatmul_grouped` takes them.

    Returns:
        `[M, H]`, dtype of x.
    """
    tokens, k = ids.shape
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    experts = torch.arange(count, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ordered, experts, right=True)  # ids that are no expert's come behind
    y = products(x[order // k], offsets) * weights.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].view(tokens, k, y.shape[1]).sum(1).to(x.dtype)


def put_stack(model: nn.Module, name: str, weight: PackedWeight | Packed) -> PackedStack:
    """Puts a packed stack in the place of the float one whose parameter has this qualified name; returns it."""
    owner_name, part = parent_name(name), name.rpartition(".")[2]
    owner = get_module(model, owner_name)
    if not isinstance(owner, PackedExperts):
        packed = PackedExperts(owner)
        set_module(model, owner_name, packed)
        owner = packed
    float_stack: Any = owner._parameters[part]
    stack = PackedStack(weight, owner.count, owner.transposed, float_stack.dtype)
    stack.training = owner.training
    owner.put(part, stack)
    return stack
