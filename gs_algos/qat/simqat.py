"""SimQAT: quantization-aware training by simulated quantization, from a float network to a checked integer one.

Weights and activations are rounded to their grid in the forward pass, with straight-through (or learned-step)
gradients, so that the network trains against its own quantization error. Jacob et al. 2018, arXiv:1712.05877;
Krishnamoorthi 2018, arXiv:1806.08342; learned steps: Esser et al. 2020, arXiv:1902.08153.

Differs from the papers: the range of an activation is the one of the previous steps, so that observing costs no extra
pass and a recomputed forward (gradient checkpointing) gives the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from gs_algos.core.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Inputs,
    history,
    remember,
    split_inputs,
)
from gs_algos.core.modules import all_or_nothing, get_module
from gs_algos.core.plan import Plan, PlanRow
from gs_algos.core.rules import Rule, did_you_mean
from gs_algos.fx.rewrite import modularize, modularize_again, modularized
from gs_algos.qat.convert import Parity, convert_model, install_converted, summary_of
from gs_algos.qat.observe import observe
from gs_algos.qat.prepare import JOINS, QuantOptions, install, make_plan, refuse_nonfinite
from gs_algos.quant.layers import FakeQuantized, Folded
from gs_algos.quant.quantizers import (
    SMALLEST_SCALE,
    ActivationQuantizer,
    Quantizer,
    WeightQuantizer,
    merge_pending,
)
from gs_algos.quant.scheme import Scheme

logger = logging.getLogger(__name__)

FOLDS = {True: "one_conv", False: "none", "one_conv": "one_conv", "two_conv": "two_conv", "none": "none"}


@dataclass(frozen=True)
class SimQATConfig(AlgorithmConfig):
    """Options of SimQAT.

    Args:
        weight: scheme of the weights (see `Scheme`): `int8@channel`, `int4@group:32:mse`, `int4@channel:lsq`.
        act: scheme of the activations, e.g. `int8@tensor:ema=0.01`; None leaves them float.
        fold_bn: how a batch norm behind a layer is treated in training: `one_conv` (True), `two_conv`, `none` (False).
        fusion: True quantizes an activation where the next layer reads it, behind batch norm and activation function;
            False right behind each conv or linear, whose batch norm then stays a float layer.
        quant_delay: optimizer steps before quantization starts; one number, or (activation, weight).
        freeze_bn: optimizer steps after which batch norm statistics stand still; None for never.
        rules: `(pattern, {"weight": ..., "act": ...} | None)`, see `gs_algos.core.rules`; None leaves the layer float.
    """

    weight: str = "int8@channel"
    act: str | None = "int8@tensor:ema"
    fold_bn: bool | str = True
    fusion: bool = True
    quant_delay: int | tuple[int, int] = 0
    freeze_bn: int | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        Scheme.parse(self.weight, "weight")
        if self.act is not None:
            Scheme.parse(self.act, "act")
        if self.fold_bn not in list(FOLDS):
            raise ValueError(f"SimQAT: fold_bn must be one of {', '.join(map(str, FOLDS))}, got {self.fold_bn!r}")
        if not self.fusion and FOLDS[self.fold_bn] != "none":
            raise ValueError(
                f"SimQAT: fold_bn needs fusion=True, since fusion=False quantizes between conv and batch norm, got "
                f"fold_bn={self.fold_bn!r}; use fold_bn=False"
            )
        delays = self.quant_delay if isinstance(self.quant_delay, tuple) else (self.quant_delay,) * 2
        if len(delays) != 2 or not all(isinstance(steps, int) and steps >= 0 for steps in delays):
            raise ValueError(
                f"SimQAT: quant_delay must be steps >= 0, one number or (activation, weight), got {self.quant_delay!r}"
            )
        if self.freeze_bn is not None and not (isinstance(self.freeze_bn, int) and self.freeze_bn >= 0):
            raise ValueError(f"SimQAT: freeze_bn must be >= 0 steps or None, got {self.freeze_bn!r}")

    @property
    def delays(self) -> tuple[int, int]:
        """(activation, weight) delay in optimizer steps."""
        return (self.quant_delay, self.quant_delay) if isinstance(self.quant_delay, int) else self.quant_delay

    def options(self) -> QuantOptions:
        act_delay, weight_delay = self.delays
        return QuantOptions(
            weight=self.weight,
            act=self.act,
            fold=FOLDS[self.fold_bn],
            fusion=self.fusion,
            act_delayed=act_delay > 0,
            weight_delayed=weight_delay > 0,
            freezable=self.freeze_bn is not None,
            rules=self.rules,
        )


class SimQAT(Algorithm):
    """Quantization-aware training. The options are those of `SimQATConfig`, given by keyword.

    ```python
    algo = SimQAT(weight="int8@channel", act="int8@tensor:ema")
    net = algo.apply(net, example_inputs)
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    """

    name: ClassVar[str] = "simqat"

    def __init__(
        self, config: SimQATConfig | None = None, *, process_group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        if config is not None and options:
            raise ValueError(f"SimQAT: options come either in a config or by keyword, got both ({', '.join(options)})")
        known = [option.name for option in fields(SimQATConfig)]
        for option in options.keys() - known:
            near = did_you_mean(option, known)
            raise TypeError(f"SimQAT: options are {', '.join(known)} and process_group, got {option}{near}")
        if "rules" in options:
            options["rules"] = tuple(options["rules"])
        self.config: SimQATConfig = config or SimQATConfig(**options)
        self.steps = 0
        self.parity: Parity | None = None
        self.process_group = process_group
        self._example: Inputs | None = None
        self._layers: dict[str, FakeQuantized] = {}
        self._quantizers: dict[str, Quantizer] = {}
        self._freezable: list[Tensor] = []

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """The dry run: every Conv and Linear, its schemes and batch norm, or why it stays float. Touches nothing."""
        return make_plan(self.name, model, example_inputs, self.config.options())

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Swaps the planned layers of the live model to fake-quantized ones; `example_inputs` start their ranges.

        The object tree, the float parameters and their names stay; quantizer state is added under new names. A module
        that calls `F.conv2d` or `F.linear` on a parameter becomes a `torch.fx.GraphModule` with a layer there; if that
        is the model itself, the result is another object with the same parameters.

        Raises:
            RuntimeError: if the model is already prepared or converted.
            ValueError: if the inputs do not run through the model, nothing can be quantized, or a weight or what a
                layer sees is not finite. The model is then as it was.
        """
        self._refuse_twice(model)
        plan = self.plan(model, example_inputs)
        if not plan.acted():
            raise ValueError(f"SimQAT.apply: at least one layer must be quantizable, got none:\n{plan}")
        try:
            with all_or_nothing(model):
                return self._prepared(model, plan, example_inputs)
        except BaseException:
            self._unbind()
            raise

    def _prepared(self, model: nn.Module, plan: Plan, example_inputs: Inputs) -> nn.Module:
        known = modularized(model)
        if any(row.kind.startswith("F.") for row in plan.acted()):
            args, kwargs = split_inputs(example_inputs)
            model = modularize(model, args, kwargs)
        new = [item for item in modularized(model) if item not in known]
        planned = [row.site for row in plan.acted() if row.kind not in JOINS]
        refuse_nonfinite("SimQAT.apply", ((site, get_module(model, site)) for site in planned))
        model = install(model, plan.rows, self.config.options())
        self.steps = 0
        self._bind(model)
        self._example = example_inputs
        observe(
            "SimQAT.apply", model, self._activations(), [example_inputs], provisional=True, group=self.process_group
        )
        remember(model, self._entry("prepared", plan.rows, new))
        return model

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Sets every activation range from data before training: `batches` of inputs, or your own `forward_loop`.

        Raises:
            RuntimeError: if `apply` was not called on this model.
            ValueError: if not exactly one of the two is given, it shows the model nothing, or a weight or an activation
                is not finite. The ranges are then as they were.
        """
        self._require_bound("calibrate")
        if (batches is None) == (forward_loop is None):
            raise ValueError("SimQAT.calibrate: give either batches or forward_loop")
        refuse_nonfinite("SimQAT.calibrate", self._layers.items())
        observe("SimQAT.calibrate", model, self._activations(), batches, forward_loop, group=self.process_group)
        for name, layer in self._layers.items():
            layer.weight_quantizer.initialise(layer.folded_weight().detach())
            logger.debug("calibrated %s", name)

    def step(self) -> None:
        """Moves ranges, batch norm snapshots and schedules on. Call it after every optimizer step, on every rank.

        Raises:
            RuntimeError: if `apply` was not called.
        """
        self._require_bound("step")
        self.steps += 1
        merge_pending(list(self._activations().values()), self.process_group)
        for layer in self._layers.values():
            if isinstance(layer, Folded):
                layer.refresh()
        for quantizer in self._quantizers.values():
            if quantizer.scheme.learned:
                quantizer.scale.data.clamp_(min=SMALLEST_SCALE)
        self._switch()
        self._history["steps"] = self.steps

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Replaces every trained layer by integer codes and scales, its batch norm by an identity; checks the outputs.

        Each layer is compared with the trained one on the same input, then the whole network on `example_inputs`
        (default: those of `apply`). `self.parity` holds the largest differences.

        Raises:
            RuntimeError: if the model is not prepared, is sharded, or a converted output differs from the trained one.
            ValueError: if a weight, a statistic, a range or what a layer sees is not finite.
        """
        entry = history(model)[-1] if history(model) else {}
        if entry.get("algorithm") != self.name or entry.get("stage") != "prepared":
            raise RuntimeError(
                f"SimQAT.convert: the model must be one that apply prepared, got one that is "
                f"{entry.get('stage', 'float')}; call apply first, and unwrap DDP with model.module"
            )
        self._require_bound("convert")
        example = self._example if example_inputs is None else example_inputs
        if example is None:
            raise RuntimeError("SimQAT.convert: a resumed algorithm has no example inputs; give example_inputs")
        trained = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantized | Quantizer | _BatchNorm)]
        refuse_nonfinite("SimQAT.convert", trained)
        rows = [PlanRow(**row) for row in entry["plan"]]
        own = not set(self._layers.values()).isdisjoint(model.modules())
        self.parity = convert_model(model, rows, example)
        remember(model, {**entry, "stage": "converted", "steps": self.steps})
        if own:  # a copy may be converted while the training of the original goes on
            self._unbind()
        return model

    def summary(self, model: nn.Module) -> str:
        """A table of the quantized layers: schemes, bytes, and the arithmetic each one runs in."""
        return summary_of(model)

    def learned_parameters(self) -> list[nn.Parameter]:
        """The steps and zero points that `lsq` schemes added, for an optimizer that was made before `apply`."""
        self._require_bound("learned_parameters")
        return [p for quantizer in self._quantizers.values() for p in quantizer.parameters()]

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        entry = history(model)[-1] if history(model) else {}
        if entry.get("algorithm") != cls.name or entry.get("stage") != "prepared":
            raise RuntimeError("SimQAT.resume: the model must be one that was saved while prepared by SimQAT")
        algo = cls(config_from(entry["config"]))
        algo._bind(model)
        algo.steps = entry["steps"]
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        rows = [PlanRow(**row) for row in entry["plan"]]
        model = modularize_again(model, entry["modularized"])
        model = install(model, rows, config_from(entry["config"]).options())
        if entry["stage"] == "converted":
            install_converted(model, rows)
        return model

    def _entry(self, stage: str, rows: tuple[PlanRow, ...], modularized: list[Any]) -> dict[str, Any]:
        self._history = {
            "algorithm": self.name,
            "stage": stage,
            "steps": self.steps,
            "config": config_to(self.config),
            "plan": [row.__dict__ for row in rows],
            "modularized": modularized,
        }
        return self._history

    def _bind(self, model: nn.Module) -> None:
        """Remembers the live layers and quantizers that `step` has to visit."""
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantized)}
        self._quantizers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
        self._freezable = [m.frozen for m in model.modules() if isinstance(getattr(m, "frozen", None), Tensor)]  # type: ignore[misc]
        entries = history(model)
        if entries:
            self._history = entries[-1]

    def _unbind(self) -> None:
        self._layers, self._quantizers, self._freezable = {}, {}, []

    def _activations(self) -> dict[str, ActivationQuantizer]:
        return {n: q for n, q in self._quantizers.items() if isinstance(q, ActivationQuantizer)}

    def _switch(self) -> None:
        """Opens the delay gates and freezes the batch norms at their step; tensors, so nothing recompiles."""
        delays = dict(zip((ActivationQuantizer, WeightQuantizer), self.config.delays, strict=True))
        for quantizer in self._quantizers.values():
            if quantizer.gate is not None and self.steps == delays[type(quantizer)]:
                quantizer.gate.fill_(True)
        if self.config.freeze_bn is not None and self.steps == self.config.freeze_bn:
            for frozen in self._freezable:
                frozen.fill_(True)

    def _refuse_twice(self, model: nn.Module) -> None:
        if any(entry["algorithm"] == self.name for entry in history(model)):
            stage = history(model)[-1]["stage"]
            raise RuntimeError(
                f"SimQAT.apply: the model must not be quantized yet, got one that is {stage}; build it anew"
            )

    def _require_bound(self, method: str) -> None:
        if not self._quantizers:
            raise RuntimeError(f"SimQAT.{method}: must come between apply and convert; call apply(model, inputs) first")


def config_to(config: SimQATConfig) -> dict[str, Any]:
    """The config as JSON; a rule on a module class becomes `type:Name`."""
    rules = [[p if isinstance(p, str) else f"type:{p.__name__}", v if v is None else dict(v)] for p, v in config.rules]
    return {**{k: v for k, v in config.__dict__.items() if k != "rules"}, "rules": rules}


def config_from(data: dict[str, Any]) -> SimQATConfig:
    delay = data["quant_delay"]
    return SimQATConfig(
        **{
            **data,
            "quant_delay": tuple(delay) if isinstance(delay, list) else delay,
            "rules": tuple((p, v) for p, v in data["rules"]),
        }
    )
