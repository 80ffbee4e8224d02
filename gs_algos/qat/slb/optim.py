"""Trains the logits of fused layers: optimizers that compute a gradient and apply it in one pass, and store none.

```python
algo = SLB(weight="4bit@channel", fused=True, total_steps=n)  # or by rule: ("re:stages.*", {"fused": True})
net = algo.apply(net, example_inputs)
optimizers = SlbAdamW(algo.fused_layers(), lr=1e-3), torch.optim.SGD(algo.parameters(net), lr=0.1)
```

A fused layer has the parameter `weight`, the mixture of levels that its logits give. Backward, DDP, FSDP2, clipping and
gradient scaling see this weight and its gradient alone. `step` of the optimizer makes new logits from that gradient;
`SLB.step` then writes the new mixture into `weight`. Once the codes are chosen, `step` changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gs_algos.qat.slb.layers import SearchedLayer
from gs_algos.qat.slb.search import LevelSearch, local, rows_of
from gs_kernels import slb_adamw_, slb_sgd_

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, dw, levels, temperature


class _SearchOptimizer(torch.optim.Optimizer):
    """Takes layers, or dicts with "layers", as parameter groups, and steps the logits behind the layers' weights.

    FSDP2: fully_shard first, then the optimizer. DDP: in either order.
    """

    def __init__(self, layers: Iterable[SearchedLayer] | Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        self._searches: dict[nn.Parameter, LevelSearch] = {}
        items: list[Any] = list(layers)
        groups = items if items and isinstance(items[0], dict) else [{"layers": items}]
        super().__init__(groups, defaults)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Adds a group whose parameters are the weights of the layers of `group["layers"]`."""
        who = type(self).__name__
        if "layers" not in group:
            raise ValueError(f"{who}: a group must have layers, got {', '.join(group) or 'nothing'}")
        weights = []
        for layer in group["layers"]:
            if not isinstance(layer, SearchedLayer) or not layer.fused:
                raise ValueError(
                    f"{who}: layers must be those of SLB.fused_layers(), got {type(layer).__name__}; use fused=True"
                )
            weight: Any = layer._parameters["weight"]
            self._searches[weight] = layer.search
            layer.search.owned = True
            weights.append(weight)
        super().add_param_group({**{key: value for key, value in group.items() if key != "layers"}, "params": weights})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                search = self._searches[weight]
                logits = local(search.logits)
                if weight.grad is None or search.one_hot or not logits.numel():
                    continue
                dw = local(weight.grad)
                scale = search.scales()
                scale = None if scale is None else rows_of(scale, search.logits).contiguous()
                self._update(group, self.state[weight], search, (logits, dw, search.levels, search.temperature), scale)
        return loss

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Tensor],
        search: LevelSearch,
        operands: Operands,
        scale: Tensor | None,
    ) -> None:
        raise AssertionError("every optimizer has an update")


class SlbAdamW(_SearchOptimizer):
    """Does what `torch.optim.AdamW` does, on the logits of fused layers. State: fp32 `exp_avg`, `exp_avg_sq` per logit.

    Differs from torch: weight decay is 0 by default, since it draws logits together, which slows the search.
    """

    def __init__(
        self,
        layers: Iterable[SearchedLayer] | Sequence[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(layers, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Tensor],
        search: LevelSearch,
        operands: Operands,
        scale: Tensor | None,
    ) -> None:
        if not state:
            state["step"] = torch.zeros(1, dtype=torch.float32, device=search.temperature.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(search.logits, dtype=torch.float32, requires_grad=False)
        state["step"] += 1
        moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
        options: dict[str, Any] = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        slb_adamw_(*operands, *moments, state["step"], scale, **options)


class SlbSGD(_SearchOptimizer):
    """Does what `torch.optim.SGD` does, on the logits of fused layers. State with momentum: fp32 `momentum_buffer`."""

    def __init__(
        self,
        layers: Iterable[SearchedLayer] | Sequence[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(layers, options)

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Tensor],
        search: LevelSearch,
        operands: Operands,
        scale: Tensor | None,
    ) -> None:
        if group["momentum"] and not state:
            state["momentum_buffer"] = torch.zeros_like(search.logits, dtype=torch.float32, requires_grad=False)
        options: dict[str, Any] = {key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")}
        buffer = local(state["momentum_buffer"]) if group["momentum"] else None
        slb_sgd_(*operands, buffer, scale, **options)
