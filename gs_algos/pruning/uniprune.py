"""Prunes blocks of channels of the whole network together, in rounds: what was cut by mistake may grow back.

The units of a group are sorted by `||w|| |gamma|` and taken in blocks of `round_to` channels, so every layer keeps a
width that hardware likes. Every `every` steps the blocks that matter least in the whole network become zeros, more of
them each time; the training goes on, and zeros may grow until the last round, which meets the budget and decides.

A block matters as much as its median, relative to that of the best block of its group: layers of any scale compare.

The zeros between rounds are put where a gradient still reaches them: into gamma of the batch norm behind a layer, into
weights where there is none. beta and biases stay, since behind a ReLU nothing grows from a channel of 0; one whose beta
is negative stays off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from gs_algos.core.modules import get_module
from gs_algos.pruning.budget import Budget, Rates, step_of
from gs_algos.pruning.channel_gates import GatedLayer
from gs_algos.pruning.channel_groups.groups import GroupLayer, Groups, stays, tensors_by_name
from gs_algos.pruning.config import PruneBaseOptions, PruningConfig
from gs_algos.pruning.importance import scaled_norm, unit_scores
from gs_algos.pruning.planning import choose_units
from gs_algos.pruning.pruner import Pruner

ROUNDS = 10  # before the last, where nothing else is asked for


@dataclass(frozen=True)
class UniPruneConfig(PruningConfig):
    """Options of UniPrune, beside those of `PruningConfig`.

    Args:
        round_to: channels of a block, 16 or 32 for hardware; a layer that has no two blocks stays whole.
        floor: blocks of each layer that stay.
        scope: `global` ranks the blocks of all layers together; `layer` takes the same share of each.
        select_steps: optimizer steps before the last round; 0: the only round is that of `apply`.
        every: optimizer steps from one round to the next.
    """

    scope: str = "global"
    round_to: int = 16
    select_steps: int = 1000
    every: int = 100

    who: ClassVar[str] = "UniPrune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"UniPrune: every must be a whole number >= 1, got {self.every!r}")


class UniPruneOptions(PruneBaseOptions, total=False):
    """Types the fields of `UniPruneConfig` as keywords of `UniPrune`, for type checkers."""

    every: int


class UniPrune(Pruner):
    """Cuts blocks of channels in rounds, to a budget of the whole network. Options: those of `UniPruneConfig`.

    ```python
    algo = UniPrune(budget="50% flops", round_to=16, select_steps=2000, every=200)
    net = algo.apply(net, example_inputs)
    ...; algo.step()  # weights train on from the first step; the last round is after select_steps
    net = algo.convert(net)
    ```
    """

    name: ClassVar[str] = "uniprune"
    config_class: ClassVar[type[PruningConfig]] = UniPruneConfig
    config: UniPruneConfig

    def __init__(
        self,
        config: UniPruneConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[UniPruneOptions],
    ) -> None:
        super().__init__(config, process_group=process_group, **options)

    @classmethod
    def training_options(cls, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
        """Gives half of the training to the rounds, the rest to the network that the last one left."""
        steps = epochs * steps_per_epoch // 2
        return {"select_steps": steps, "every": max(1, steps // ROUNDS)}

    @property
    def scores_weights(self) -> bool:
        return True

    def gated_layer_sizes(self, model: nn.Module, groups: Groups, rates: Rates) -> dict[str, int]:
        return {}

    def put_gate(self, model: nn.Module, site: str, size: int, groups: Groups) -> None:
        raise AssertionError("UniPrune gates no layer")

    @torch.no_grad()
    def learn(self, layers: Iterable[GatedLayer]) -> None:
        """Holds a round, if it is time for one: puts zeros in the worst blocks, which may grow from the next step."""
        if (self.steps + 1) % self.config.every or self.steps + 1 == self.config.select_steps:
            return
        assert self._model is not None and self.groups is not None
        config, rates = self._so_far((self.steps + 1) / self.config.select_steps)
        keep = choose_units(config, self.groups, self.scores(self._model, self.groups), rates, self._model)
        for tensor, dim, index in switches(self._model, self.groups, keep):
            tensor.index_fill_(dim, index, 0)

    def _so_far(self, done: float) -> tuple[UniPruneConfig, Rates]:
        """Returns the options and rates of a round: what goes grows in equal steps to what goes in the last one."""
        budget = None if self.config.budget is None else Budget.parse(self.config.budget)
        left = None if budget is None else str(replace(budget, percent=100 - done * (100 - budget.percent)))
        rates = {name: None if rate is None else done * rate for name, rate in self._rates.items()}
        return replace(self.config, rate=done * self.config.rate, budget=left), rates

    def scores(self, model: nn.Module, groups: Groups) -> Tensor:
        """Returns the importance of each unit's block.

        Raises:
            RuntimeError: if a norm of weights is not finite.
        """
        units = unit_scores(model, groups, _finite_norm)
        scores = torch.full_like(units, torch.nan)
        for group in groups.prunable():
            part = slice(group.first, group.first + group.n)
            scores[part] = block_importance(units[part], step_of(group, self.config.round_to))
        return scores


def block_importance(scores: Tensor, size: int) -> Tensor:
    """Returns for each unit `median(its block) / median(best block)`, `[n]`; blocks are of the sorted scores.

    Args:
        scores: `[n]`, >= 0; NaN where nothing tells, which comes back.
        size: units of a block; the last block, of the lowest scores, may have fewer.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    blocks = scores[order].split(size)
    medians = torch.stack([block.quantile(0.5) for block in blocks])
    relative = medians / medians[0].clamp(min=torch.finfo(scores.dtype).tiny)
    importance = torch.empty_like(scores)
    importance[order] = torch.cat([m.expand(len(block)) for m, block in zip(relative, blocks, strict=True)])
    return importance


def switches(model: nn.Module, groups: Groups, keep: Tensor) -> list[tuple[Tensor, int, Tensor]]:
    """Lists (parameter, dimension, indices) of what turns the units off that go, so that a gradient still reaches it.

    gamma of the batch norm behind each layer of a group, or the layer's weight.
    """
    found: list[tuple[Tensor, int, Tensor]] = []
    for layer in (layer for group in groups.prunable() for layer in group.layers):
        gamma = _gamma(model, layer)
        tensor, dim = (tensors_by_name(model)[layer.tensor], layer.dim) if gamma is None else (gamma, 0)
        gone = (~stays(keep, layer.units)).nonzero().flatten()
        found.append((tensor.data, dim, gone.to(tensor.device)))
    return found


def _gamma(model: nn.Module, layer: GroupLayer) -> Tensor | None:
    return None if layer.norm is None else get_module(model, layer.norm)._parameters.get("weight")


def _finite_norm(model: nn.Module, layer: GroupLayer) -> Tensor:
    """Returns `||w|| |gamma|` of each output channel, relative to its mean."""
    norms = scaled_norm(model, layer)
    if not bool(norms.isfinite().all()):
        raise RuntimeError(
            f"UniPrune: weights must be finite for blocks to be ranked, got nan or inf in {layer.name}; "
            "lower the learning rate, and go on from an earlier checkpoint"
        )
    return norms
