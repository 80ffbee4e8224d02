"""Removes attention heads by hard concrete gates, or without training by the gradients of gates.

Each head has a gate `z = clip(1.2 s - .1, 0, 1)`, `s = sigmoid((log u - log(1 - u) + a) / .33)`, u uniform, and the
expected number of heads `sum sigmoid(a - .33 log(.1 / 1.1))` gets a price that rises while there are more than wanted.
Louizos et al. 2018, arXiv:1712.01312; Voita et al. 2019, arXiv:1905.09418.

The last round leaves no gate: the heads of the highest a stay, as many as wanted, and their gates without noise are
multiplied into the output projection; the others become zeros, which `convert` cuts.

Without training a head is worth the mean squared gradient of its gate (Michel et al. 2019, arXiv:1905.10650) of
`-log p` of labels that are drawn from the network's own outputs.

Differs from the papers: the price is a multiplier that meets a count, not a chosen strength; gates without noise are
stretched and clipped as those with noise are, so that open ones are exactly 1, and nothing changes at the start; query
heads that share their keys and values have one gate; squares of gradients, not magnitudes, since only their mean does
not depend on how samples are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from gs_algos.core.algorithm import Inputs, evaluating, run, without_parameter_gradients
from gs_algos.core.batches import InputsOf, checked_batches
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of
from gs_algos.core.progress import progress
from gs_algos.pruning.budget import Rates
from gs_algos.pruning.channel_gates import GatedLayer
from gs_algos.pruning.channel_groups.groups import Group, Groups
from gs_algos.pruning.config import PruneBaseOptions, PruningConfig
from gs_algos.pruning.head_gates import HeadGate, chance_open, fold_gates, gate_place, put_head_gate
from gs_algos.pruning.planning import choose_units
from gs_algos.pruning.pruner import Pruner

IMPORTANCES = ("gates", "gradient")
BETAS = (0.9, 0.99)  # of the Adam that trains a
PRICE_RATE = 0.05  # by which the price rises in a step, times the share of heads that are too many
STIFFNESS = 1.0  # of the price that follows the count at once, and keeps it from swinging
TRAVEL = 16.0  # how far a can move in the first phase, at least
RAMP = 0.5  # share of the first phase in which the wanted count falls from all heads to those that stay


@dataclass(frozen=True)
class HeadsConfig(PruningConfig):
    """Options of Heads, beside those of `PruningConfig`. Its units are heads, or groups that share keys and values.

    Args:
        rate: share of the heads that go, in [0, 1).
        scope: `global` lets layers lose different numbers of heads; `layer` takes the same share of each.
        floor: heads of each layer that stay, times those that `round_to` channels take.
        importance: `gates`, trained beside the weights for `select_steps`; or `gradient`, from some batches, by
            `calibrate` or by `select_steps` batches of your own loss, while the weights stand still.
        select_steps: optimizer steps before the heads are chosen.
        lr: learning rate of a; None: max(0.05, 16 / select_steps), at most 0.5. Gates that are to close must get from 3
            to -3 and have time to settle.
    """

    scope: str = "global"
    select_steps: int = 1000
    importance: str = "gates"
    lr: float | None = None

    who: ClassVar[str] = "Heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in IMPORTANCES:
            raise ValueError(f"Heads: importance must be {' or '.join(IMPORTANCES)}, got {self.importance!r}")
        if self.select_steps < 1:
            raise ValueError(f"Heads: select_steps must be >= 1, got {self.select_steps}; gates need gradients")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"Heads: lr must be > 0, got {self.lr}")


class HeadsOptions(PruneBaseOptions, total=False):
    """Types the fields of `HeadsConfig` as keywords of `Heads`, for type checkers."""

    importance: str
    lr: float | None


class Heads(Pruner):
    """Cuts attention heads, found by what attention does and not by names. Options: those of `HeadsConfig`.

    ```python
    algo = Heads(rate=0.5, select_steps=2000)
    net = algo.apply(net, example_inputs)
    ...; algo.step()  # gates and weights train; after select_steps the weights of the heads that stay
    net = algo.convert(net)

    algo = Heads(rate=0.5, importance="gradient")  # no training, no labels
    net = algo.apply(net, example_inputs)
    algo.calibrate(net, batches)
    net = algo.convert(net)
    ```
    """

    name: ClassVar[str] = "heads"
    config_class: ClassVar[type[PruningConfig]] = HeadsConfig
    config: HeadsConfig

    def __init__(
        self,
        config: HeadsConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[HeadsOptions],
    ) -> None:
        super().__init__(config, process_group=process_group, **options)
        self._counted: list[tuple[list[HeadGate], int]] = []

    @property
    def trains(self) -> bool:  # type: ignore[override]
        """Says whether gates are trained; else `calibrate` does all that is done between `apply` and `convert`."""
        return self.config.importance == "gates"

    @property
    def still(self) -> bool:
        return not self.trains

    @classmethod
    def training_options(cls, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
        """Gives half of the training to the gates, the rest to the network that they left."""
        return {"select_steps": max(1, epochs * steps_per_epoch // 2)}

    def why_unscored(self, model: nn.Module, group: Group, groups: Groups) -> str:
        if not group.heads:
            return "is not made of attention heads"
        try:
            gate_place(model, groups, group)
        except ValueError as error:
            return f"has heads that {error}"
        return ""

    def gated_layer_sizes(self, model: nn.Module, groups: Groups, rates: Rates) -> dict[str, int]:
        places = (gate_place(model, groups, group) for group in groups.prunable() if group.name in rates)
        return {site: len(columns) for site, columns in places}

    def put_gate(self, model: nn.Module, site: str, size: int, groups: Groups) -> None:
        group, columns = _group_at(model, groups, site)
        if len(columns) != size:
            raise ValueError(
                f"Heads: {site} must read {size} columns of heads, got {len(columns)}; it is another model"
            )
        put_head_gate(get_module(model, site), columns, group.n, hard=self.trains)

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        super().restore(model, entry)
        if entry["stage"] == "prepared":
            for module in model.modules():
                if isinstance(module, HeadGate):  # it acts in eval mode too
                    module.gate_on = entry["steps"] < entry["config"]["select_steps"]
        return model

    def _bind(self, model: nn.Module, groups: Groups, rates: Rates) -> None:
        super()._bind(model, groups, rates)
        self._counted = []
        if self._gated:
            self._counted = self._wanted(model, groups, rates)

    def _wanted(self, model: nn.Module, groups: Groups, rates: Rates) -> list[tuple[list[HeadGate], int]]:
        """Returns sets of gated layers, and of how many heads each set keeps."""
        keep = choose_units(self.config, groups, torch.zeros(groups.n), rates, model)
        alone: list[tuple[list[HeadGate], int]] = []
        together: list[HeadGate] = []
        count = 0
        for site, layer in self._gated.items():
            assert isinstance(layer, HeadGate)
            group = _group_at(model, groups, site)[0]
            left = int(keep[group.first : group.first + group.n].sum())
            if self.config.scope == "layer" or rates[group.name] is not None:
                alone.append(([layer], left))
            else:
                together, count = [*together, layer], count + left
        return [*alone, (together, count)] if together else alone

    @torch.no_grad()
    def learn(self, layers: Iterable[GatedLayer]) -> None:
        """Takes one step of Adam on a, with the price of open gates; without training adds up squared gradients."""
        live = [layer for layer in layers if layer.gate.grad is not None]
        if not self.trains:
            for layer in live:
                layer.gate_square += layer.gate.grad.square()  # type: ignore[union-attr]
        elif live:
            for members, wanted in self._counted:
                self._charge(members, wanted)
            lr = min(0.5, max(0.05, TRAVEL / self.config.select_steps)) if self.config.lr is None else self.config.lr
            optimizer = torch.optim.Adam([layer.gate for layer in live], lr, betas=BETAS)
            for layer in live:
                moments = {"exp_avg": layer.gate_mean, "exp_avg_sq": layer.gate_square}
                optimizer.state[layer.gate] = {"step": torch.tensor(float(self.steps)), **moments}
            optimizer.step()

    def _charge(self, layers: list[HeadGate], wanted: int) -> None:
        """Raises the price while more gates are open than wanted, and adds its gradient to those of a."""
        whole = sum(len(layer.gate) for layer in layers)
        done = min(1.0, (self.steps + 1) / (RAMP * self.config.select_steps))
        chances = [chance_open(layer.gate) for layer in layers]
        excess = (sum(c.sum() for c in chances) - (whole + done * (wanted - whole))) / whole
        for layer, chance in zip(layers, chances, strict=True):
            layer.gate_price += PRICE_RATE * excess
            if layer.gate.grad is not None:
                layer.gate.grad += (layer.gate_price + STIFFNESS * excess) * chance * (1 - chance)

    def _select(self) -> None:
        """Chooses the heads; the gates of those that stay go into the weights that read them."""
        super()._select()
        if self.trains:
            for layer in self._gated.values():
                fold_gates(layer)

    def scores(self, model: nn.Module, groups: Groups) -> Tensor:
        """Returns a of each head, or the mean squared gradient of its gate; NaN for units that are no heads.

        Raises:
            RuntimeError: if one is not finite.
        """
        scores = torch.full((groups.n,), torch.nan)
        for site, layer in self._gated.items():
            group = _group_at(model, groups, site)[0]
            own = (layer.gate if self.trains else layer.gate_square).detach().float().cpu()
            if not bool(own.isfinite().all()):
                raise RuntimeError(
                    f"Heads: scores of heads must be finite, got nan or inf at {site}; lower the learning rate, "
                    "or look for inputs that are not finite"
                )
            scores[group.first : group.first + group.n] = own
        return scores

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Chooses the heads without training, from the logits of the network on some batches, and zeroes the others.

        Labels are drawn from the network's own softmax, so none are needed; tokens that `attention_mask` leaves out do
        not count. `forward_loop` must run with gradients on. On several ranks, each sees batches of its own.

        Raises:
            RuntimeError: if `importance` is not `gradient`, `apply` was not called on this model, or heads are chosen.
            ValueError: if not exactly one of the two is given, no batch runs through the model, its output is no
                logits, or a gradient is not finite. Nothing is chosen then.
        """
        who = "Heads.calibrate"
        model = network_of(model, who)
        if self._require_bound("calibrate") is not model:
            raise RuntimeError(f"{who}: the model must be the one that the algorithm prepared, got another")
        if self.trains:
            raise RuntimeError(f"{who}: gates must be trained by steps, got importance='gates'; or use 'gradient'")
        if not self.selecting:
            raise RuntimeError(f"{who}: heads must still be chosen, got step {self._steps}, which is behind that")
        if (batches is None) == (forward_loop is None):
            raise ValueError(f"{who}: give either batches or forward_loop")
        given, inputs_of = checked_batches(who, () if batches is None else batches), InputsOf(who, model, self._example)
        reader = _GradientReader(who, list(self._gated.values()), next(model.parameters()).device)
        before = [layer.gate_square.clone() for layer in self._gated.values()]
        handle = model.register_forward_hook(reader.after, with_kwargs=True)
        done = False
        try:
            with evaluating(model), torch.enable_grad(), without_parameter_gradients(model):
                if forward_loop is not None:
                    forward_loop(model)
                for batch in progress(given, "ranking heads"):
                    run(model, inputs_of(batch), who)
            if not reader.seen:
                raise ValueError(f"{who}: at least one batch must run through the model, got none")
            self._share_squares()
            self.scores(model, self.groups)  # type: ignore[arg-type]
            done = True
        finally:
            handle.remove()
            for layer, square in zip(self._gated.values(), before, strict=True) if not done else ():
                layer.gate_square.copy_(square)
        self._steps = self._history["steps"] = self.config.select_steps
        super()._select()

    def _share_squares(self) -> None:
        if self._has_ranks():
            for layer in self._gated.values():
                dist.all_reduce(layer.gate_square, group=self.process_group)


class _GradientReader:
    """Adds up, behind each forward, the squared gradients of gates of `-log p` of labels drawn from the logits."""

    def __init__(self, who: str, layers: list[GatedLayer], device: torch.device) -> None:
        self.who, self.layers, self.seen = who, layers, 0
        self.generator = torch.Generator(device).manual_seed(0)

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.size(-1) < 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise ValueError(
                f"{self.who}: the network must return logits [B, classes] or [B, T, classes], got {got}; or run a "
                "loss of your own, loss.backward() and algo.step(), for select_steps batches"
            )
        if not logits.requires_grad:
            raise ValueError(f"{self.who}: forward_loop must run with gradients on, got none; leave no_grad out")
        mask = kwargs.get("attention_mask")
        rows = logits.float()
        if logits.dim() == 3 and isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
            rows = rows[mask != 0]
        rows = rows.reshape(-1, rows.size(-1))
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{self.who}: logits must be finite, got nan or inf")
        labels = torch.multinomial(rows.detach().softmax(1), 1, generator=self.generator).flatten()
        loss = F.cross_entropy(rows, labels, reduction="sum")
        gates = [layer.gate for layer in self.layers]
        gradients = torch.autograd.grad(loss, gates, allow_unused=True)
        for layer, gradient in zip(self.layers, gradients, strict=True):
            if gradient is not None:
                layer.gate_square += gradient.detach().square()
        self.seen += 1


def _group_at(model: nn.Module, groups: Groups, site: str) -> tuple[Group, Tensor]:
    """Returns the group of heads whose gates are at a layer, and the head of each of the layer's columns."""
    for group in groups.prunable():
        if group.heads:
            place, columns = gate_place(model, groups, group)
            if place == site:
                return group, columns
    raise ValueError(f"Heads: {site} must read the heads of a group, got none; the model is another one")
