"""Prunes by SCOP, scientific control: each channel competes with its own answer to inputs that say nothing.

The network sees every batch with knock-offs, inputs that look like the data but do not belong to the labels. A number
beta per channel mixes the two answers; a channel that is worth no more than its control is pushed to beta <= 1/2.
Tang et al. 2020, arXiv:2010.10732.

Differs from the paper: a unit of coupled channels gets the mean score of all layers that make it; where no batch norm
follows, the norm of the channel's weights stands for |gamma|; knock-offs are the permuted batch unless given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from gs_algos.core.algorithm import Inputs
from gs_algos.core.batches import checked_batches
from gs_algos.core.modules import get_module
from gs_algos.pruning.budget import Rates
from gs_algos.pruning.channel_gates import Freezer, GatedLayer, KnockoffGate, add_gate, can_gate
from gs_algos.pruning.channel_groups.groups import Group, GroupLayer, Groups
from gs_algos.pruning.config import PruneBaseOptions, PruningConfig
from gs_algos.pruning.importance import output_scale, unit_scores
from gs_algos.pruning.knockoffs import (
    GivenKnockoffs,
    KnockoffDoubling,
    KnockoffGenerator,
    PermutedKnockoffs,
    first_half,
)
from gs_algos.pruning.pruner import Pruner

SOURCES = ("permute", "generator", "given")


@dataclass(frozen=True)
class SCOPConfig(PruningConfig):
    """Options of SCOP, beside those of `PruningConfig`.

    Args:
        select_steps: optimizer steps in which beta is trained.
        lr: learning rate of beta.
        betas: decay rates of its Adam.
        knockoffs: `permute`, the batch against itself in another order; `generator`, images of one that
            `SCOP.fit_knockoffs` trains; or `given`, the iterable handed to `SCOP(knockoffs=)`.
    """

    select_steps: int = 1000
    lr: float = 4e-3
    betas: tuple[float, float] = (0.5, 0.9)
    knockoffs: str = "permute"

    who: ClassVar[str] = "SCOP"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.select_steps < 1:
            raise ValueError(f"SCOP: select_steps must be >= 1, got {self.select_steps}; beta has to be trained")
        if not self.lr > 0:
            raise ValueError(f"SCOP: lr must be > 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"SCOP: betas must be two numbers in [0, 1), got {self.betas}")
        if self.knockoffs not in SOURCES:
            raise ValueError(
                f"SCOP: knockoffs must be permute, generator or an iterable of batches, got {self.knockoffs!r}"
            )


class SCOPOptions(PruneBaseOptions, total=False):
    """Types the fields of `SCOPConfig` as keywords of `SCOP`, but for `knockoffs`, for type checkers."""

    lr: float
    betas: tuple[float, float]


class SCOP(Pruner):
    """Cuts channels that do no better than their knock-offs. The options are those of `SCOPConfig`, given by keyword.

    ```python
    algo = SCOP(rate=0.45, select_steps=2000)
    net = algo.apply(net, example_inputs)
    for x, target in loader:  # the first 2000 steps train beta alone, the rest the masked network
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    In the first phase `net(x)` runs on x and its knock-offs and returns the outputs of x.

    Args:
        knockoffs: "permute", "generator", or an iterable of batches made like the model's inputs.
    """

    name: ClassVar[str] = "scop"
    config_class: ClassVar[type[PruningConfig]] = SCOPConfig
    config: SCOPConfig

    def __init__(
        self,
        config: SCOPConfig | None = None,
        *,
        knockoffs: str | Iterable[Inputs] | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[SCOPOptions],
    ) -> None:
        given: dict[str, Any] = {**options}
        if knockoffs is not None:
            given["knockoffs"] = knockoffs if isinstance(knockoffs, str) else "given"
        super().__init__(config, process_group=process_group, **given)
        source: GivenKnockoffs | PermutedKnockoffs | None = None
        if knockoffs is not None and not isinstance(knockoffs, str):
            source = GivenKnockoffs(knockoffs)
        if self.config.knockoffs == "permute":
            source = PermutedKnockoffs()
        self._doubling = KnockoffDoubling(self.config.knockoffs, source)

    @property
    def source(self) -> GivenKnockoffs | PermutedKnockoffs | None:
        """Returns what makes the knock-offs of the first phase."""
        return self._doubling.source

    @source.setter
    def source(self, value: GivenKnockoffs | PermutedKnockoffs | None) -> None:
        self._doubling.source = value

    @classmethod
    def training_options(cls, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
        """Gives a quarter of the training to beta, the rest to the masked network."""
        return {"select_steps": max(1, epochs * steps_per_epoch // 4)}

    def freezer(self) -> Freezer:
        return Freezer(self._doubling, first_half)

    def step(self) -> None:
        super().step()
        self._doubling.turn = self.steps

    def fit_knockoffs(self, batches: Iterable[Tensor], steps: int = 500) -> None:
        """Trains a generator on batches of images `[B, C, H, W]`; its images are the knock-offs from now on.

        batches: read several times; of `(x, y)` the images x are taken.

        Raises:
            TypeError: if the batches are no iterable, or one that is read only once.
            ValueError: if there are no batches, or they are not images of one shape.
        """
        who = "SCOP.fit_knockoffs"
        if isinstance(checked_batches(who, batches), Iterator):
            raise TypeError(f"{who}: batches must be read several times, got an iterator; give a list or a DataLoader")
        batches = _Images(batches)
        first = next(iter(batches), None)
        if not isinstance(first, Tensor) or first.dim() != 4:
            got = "none" if first is None else list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"SCOP.fit_knockoffs: batches must be images [B, C, H, W], got {got}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = KnockoffGenerator(tuple(first.shape[1:]), batch_size=len(first)).to(first.device)  # type: ignore[arg-type]
        self.source = GivenKnockoffs(generator.fit(batches, steps))

    def _enter_phase(self) -> None:
        super()._enter_phase()
        self._doubling.turn = self.steps

    def why_unscored(self, model: nn.Module, group: Group, groups: Groups) -> str:
        sites = [type(get_module(model, layer.name)).__name__ for layer in group.layers]
        can = any(can_gate(get_module(model, layer.name)) for layer in group.layers)
        return "" if can else f"is made by {', '.join(sites)}, whose outputs cannot be mixed with their control"

    def gated_layer_sizes(self, model: nn.Module, groups: Groups, rates: Rates) -> dict[str, int]:
        layers = [layer for group in groups.prunable() for layer in group.layers]
        return {x.name: len(x.units) for x in layers if can_gate(get_module(model, x.name))}

    def put_gate(self, model: nn.Module, site: str, size: int, groups: Groups) -> None:
        add_gate(get_module(model, site), KnockoffGate, size, start=0.5)

    @torch.no_grad()
    def learn(self, layers: Iterable[GatedLayer]) -> None:
        """Takes one step of Adam on beta, clamped to [0, 1]; its moments are buffers of the model, and saved."""
        live = [layer for layer in layers if layer.gate.grad is not None]
        if not live:
            return
        optimizer = torch.optim.Adam([layer.gate for layer in live], self.config.lr, betas=self.config.betas)
        for layer in live:
            moments = {"exp_avg": layer.gate_mean, "exp_avg_sq": layer.gate_square}
            optimizer.state[layer.gate] = {"step": torch.tensor(float(self.steps)), **moments}
        optimizer.step()
        for layer in live:
            layer.gate.clamp_(0, 1)

    def scores(self, model: nn.Module, groups: Groups) -> Tensor:
        return unit_scores(model, groups, beta_scores)


class _Images:
    """Iterates over the images of batches, without the labels beside them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch[0] if isinstance(batch, tuple | list) and batch else batch


def beta_scores(model: nn.Module, layer: GroupLayer) -> Tensor | None:
    """Returns `|gamma| (2 beta - 1)` per channel, |gamma| relative to its mean; None without a trained beta."""
    module = get_module(model, layer.name)
    if not isinstance(module, GatedLayer) or not bool(module.gate_square.any()):
        return None
    return output_scale(model, layer).to(module.gate.device) * (2 * module.gate.detach() - 1)
