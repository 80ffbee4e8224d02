"""Prunes by a plain importance: cuts channels by norms, batch norm scales, Taylor terms, or at random as a control.

`l1`, `l2`: norm of the channel's weights · `bn`: scale of the batch norm behind it · `taylor`: how much the loss would
change without it, `(sum g y)^2` over a batch, averaged over `select_steps` batches (Molchanov et al. 2019,
arXiv:1906.10771) · `random`: the control.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from gs_algos.core.modules import get_module
from gs_algos.pruning.budget import Rates
from gs_algos.pruning.channel_gates import GatedLayer, ScaleGate, add_gate, can_gate
from gs_algos.pruning.channel_groups.groups import Group, GroupLayer, Groups
from gs_algos.pruning.config import PruneBaseOptions, PruningConfig
from gs_algos.pruning.importance import Importance, bn_scale, gamma_of, l1, l2, random_scores, unit_scores
from gs_algos.pruning.pruner import Pruner

IMPORTANCES = ("l1", "l2", "bn", "taylor", "random")


@dataclass(frozen=True)
class PruneConfig(PruningConfig):
    """Options of Prune, beside those of `PruningConfig`.

    Args:
        importance: l1, l2, bn, taylor or random.
        select_steps: of taylor, the batches that are looked at with still weights; the others decide at once.
        seed: of random.
    """

    importance: str = "l1"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in IMPORTANCES:
            raise ValueError(f"Prune: importance must be one of {', '.join(IMPORTANCES)}, got {self.importance!r}")
        if (self.importance == "taylor") != (self.select_steps > 0):
            raise ValueError(
                f"Prune: select_steps must be > 0 for taylor and 0 for the others, got {self.select_steps} for "
                f"{self.importance}"
            )


class PruneOptions(PruneBaseOptions, total=False):
    """Types the fields of `PruneConfig` as keywords of `Prune`, for type checkers."""

    importance: str
    seed: int


class Prune(Pruner):
    """Cuts channels by magnitude, batch norm scale, Taylor term or at random. Options: those of `PruneConfig`.

    ```python
    algo = Prune(rate=0.45, importance="l2", round_to=8)
    net = algo.apply(net, example_inputs)  # zeros are in place now; taylor takes select_steps batches first
    ...; algo.step()
    net = algo.convert(net)
    ```
    """

    name: ClassVar[str] = "prune"
    config_class: ClassVar[type[PruningConfig]] = PruneConfig
    config: PruneConfig

    def __init__(
        self,
        config: PruneConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[PruneOptions],
    ) -> None:
        super().__init__(config, process_group=process_group, **options)

    @property
    def scores_weights(self) -> bool:
        return not self.config.select_steps

    def why_unscored(self, model: nn.Module, group: Group, groups: Groups) -> str:
        if self.config.importance == "bn" and all(gamma_of(model, layer) is None for layer in group.layers):
            return "has no batch norm whose scale could rank it"
        if self.config.importance == "taylor" and not any(_site(model, layer) for layer in group.layers):
            return "is made by layers whose outputs cannot be scaled"
        return ""

    def gated_layer_sizes(self, model: nn.Module, groups: Groups, rates: Rates) -> dict[str, int]:
        layers = [layer for group in groups.prunable() for layer in group.layers]
        return {site: len(layer.units) for layer in layers if (site := _site(model, layer))}

    def put_gate(self, model: nn.Module, site: str, size: int, groups: Groups) -> None:
        add_gate(get_module(model, site), ScaleGate, size, start=1.0)

    @torch.no_grad()
    def learn(self, layers: Iterable[GatedLayer]) -> None:
        for layer in layers:
            if layer.gate.grad is not None:
                layer.gate_square += layer.gate.grad.square()

    def scores(self, model: nn.Module, groups: Groups) -> Tensor:
        importances: dict[str, Importance] = {"l1": l1, "l2": l2, "bn": bn_scale, "taylor": taylor}
        chosen = importances.get(self.config.importance)
        return unit_scores(model, groups, chosen or random_scores(self.config.seed))


def taylor(model: nn.Module, layer: GroupLayer) -> Tensor | None:
    """Returns the squared gradients of the layer's gate, relative to their mean; None if none came there."""
    site = _site(model, layer)
    gated = get_module(model, site) if site else None
    if not isinstance(gated, GatedLayer) or not bool(gated.gate_square.any()):
        return None
    return gated.gate_square / gated.gate_square.mean()


def _site(model: nn.Module, layer: GroupLayer) -> str | None:
    """Returns what gets a gate of 1: the batch norm behind, in front of which a channel's scale changes nothing."""
    site = layer.name if layer.norm is None else layer.norm
    return site if can_gate(get_module(model, site)) else None
