"""Trains by SimQAT, simulated quantization: from a float network to a checked integer one.

Weights and activations are rounded to their grid in the forward pass, with straight-through (or learned-step)
gradients, so that the network trains against its own quantization error. Jacob et al. 2018, arXiv:1712.05877;
Krishnamoorthi 2018, arXiv:1806.08342; learned steps: Esser et al. 2020, arXiv:1902.08153.

Differs from the papers: the range of an activation is the one of the previous steps, so that observing costs no extra
pass and a recomputed forward (gradient checkpointing) gives the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, cast

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from gs_algos.core.algorithm import Inputs, asked_by
from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, rows_of
from gs_algos.fx.modularize.functional_calls import modularize_again
from gs_algos.qat.optimizer_watch import TrainingWatch
from gs_algos.qat.packed_start import start_from
from gs_algos.qat.training import QuantizationTraining
from gs_algos.quant.fake_quant.layers import FakeQuantized, Folded
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from gs_algos.quant.network.convert import Parity, convert_model, swap_converted_layers
from gs_algos.quant.network.layer_plan import layer_rows
from gs_algos.quant.network.planning import make_plan, with_planned_layers
from gs_algos.quant.network.prepare import QuantOptions, refuse_nonfinite, swap_layers
from gs_algos.quant.network.summary import summary_of
from gs_algos.quant.scheme import Scheme, as_text, check_rules, join_scheme, of_integers
from gs_kernels.runtime.torch_private import _BatchNorm

logger = logging.getLogger(__name__)

FOLDS = {True: "one_conv", False: "none", "one_conv": "one_conv", "two_conv": "two_conv", "none": "none"}


@dataclass(frozen=True)
class SimQATConfig(AlgorithmConfig):
    """Options of SimQAT.

    Args:
        weight: scheme of the weights, a `Scheme` or its text, which is what the config keeps: `int8@channel`,
            `int4@group:32:mse`, `int4@channel:lsq`.
        act: scheme of the activations, e.g. `int8@tensor:ema=0.01`; None leaves them float.
        fold_bn: how a batch norm behind a layer is treated in training: `one_conv` (True), `two_conv`, `none` (False).
        fusion: True quantizes an activation where the next layer reads it, behind batch norm and activation function;
            False right behind each conv or linear, whose batch norm then stays a float layer.
        quant_delay: optimizer steps before quantization starts; one number, or (activation, weight).
        freeze_bn: optimizer steps after which batch norm statistics stand still; None for never.
        rules: `(pattern, {"weight": ..., "act": ..., "join": ...} | None)`, see `gs_algos.core.layer_rules`; None
            leaves the layer float. `join` is the scheme of the add or concat that reads the layer, else that is `act`.
    """

    weight: str | Scheme = "int8@channel"
    act: str | Scheme | None = "int8@tensor:ema"
    fold_bn: bool | str = True
    fusion: bool = True
    quant_delay: int | tuple[int, int] = 0
    freeze_bn: int | None = None
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "SimQAT"

    def __post_init__(self) -> None:
        of_integers(self.weight, "SimQAT")
        if self.act is not None:
            Scheme.parse(self.act, "act")
        for name in ("weight", "act"):
            if isinstance(getattr(self, name), Scheme):
                object.__setattr__(self, name, str(getattr(self, name)))
        parsers = {
            "weight": lambda value: of_integers(value, "SimQAT"),
            "act": lambda value: Scheme.parse(value, "act"),
            "join": join_scheme,
        }
        check_rules(self.rules, "SimQAT", parsers)
        object.__setattr__(self, "rules", as_text(self.rules))
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
        """Returns the delays of (activation, weight) in optimizer steps."""
        return (self.quant_delay, self.quant_delay) if isinstance(self.quant_delay, int) else self.quant_delay

    def options(self) -> QuantOptions:
        act_delay, weight_delay = self.delays
        return QuantOptions(
            weight=str(self.weight),
            act=None if self.act is None else str(self.act),
            fold=FOLDS[self.fold_bn],
            fusion=self.fusion,
            act_delayed=act_delay > 0,
            weight_delayed=weight_delay > 0,
            freezable=self.freeze_bn is not None,
            rules=self.rules,
        )


class SimQATOptions(TypedDict, total=False):
    """Types the fields of `SimQATConfig` as keywords of `SimQAT`, for type checkers."""

    weight: str | Scheme
    act: str | Scheme | None
    fold_bn: bool | str
    fusion: bool
    quant_delay: int | tuple[int, int]
    freeze_bn: int | None
    rules: Sequence[Rule]


class SimQAT(QuantizationTraining):
    """Trains a network while its weights and activations are rounded. Options: those of `SimQATConfig`, by keyword.

    ```python
    algo = SimQAT(weight="int8@channel", act="int8@tensor:ema")
    net = algo.apply(net, example_inputs)
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    """

    name: ClassVar[str] = "simqat"
    config_class: ClassVar[type[AlgorithmConfig]] = SimQATConfig
    layer_class: ClassVar[type[nn.Module]] = FakeQuantized
    done: ClassVar[str] = "quantized"
    config: SimQATConfig
    _layers: dict[str, FakeQuantized]
    _freezable: list[Tensor]

    def __init__(
        self,
        config: SimQATConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[SimQATOptions],
    ) -> None:
        super().__init__(config, process_group=process_group, **options)

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every Conv and Linear, its schemes and batch norm, or why it stays float; touches nothing."""
        with ordinary_tensors(), asked_by("SimQAT.plan"):
            return make_plan(self.name, network_of(model, "SimQAT.plan"), example_inputs, self.config.options())

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Swaps the planned layers of the live model to fake-quantized ones; `example_inputs` start their ranges.

        The object tree, the float parameters and their names stay; quantizer state is added under new names. A module
        that calls `F.conv2d`, `F.linear` or a matrix product on a parameter becomes a `torch.fx.GraphModule` with a
        layer there, or the layer if that is all it is (Transformers' Conv1D); if that is the model itself, the result
        is another object with the same parameters.

        Raises:
            RuntimeError: if the model is already prepared or converted.
            ValueError: if the inputs do not run through the model, nothing can be quantized, or a weight or what a
                layer sees is not finite. The model is then as it was.
        """
        return super().apply(model, example_inputs)

    def swap_layers(self, model: nn.Module, plan: Plan, example_inputs: Inputs) -> tuple[nn.Module, dict[str, Any]]:
        model, new = with_planned_layers(model, plan, example_inputs)
        planned = [row.site for row in layer_rows(plan.rows)]
        refuse_nonfinite("SimQAT.apply", ((site, get_module(model, site)) for site in planned))
        return swap_layers(model, plan.rows, self.config.options()), {"modularized": new}

    def start_from(self, packed: nn.Module) -> None:
        """Begins where PTQ, or another library, left the network: at its packed weights, on their very grids.

        Call it behind `apply`, before training. The schemes are learned, and `:asym` at 2 to 4 bits: PTQ's symmetric
        grids have scales of both signs, which a step > 0 and a zero point say too.

        Args:
            packed: a network of the same structure and names, whose layers that are trained here are `PackedLinear`,
                as `PTQ` and `quantize_weights` make them. It stays as it is.

        Raises:
            RuntimeError: if `apply` was not called, or training began.
            ValueError: if layers, tensors or shapes of the two differ, or a scheme is not learned or cannot hold the
                packed values. The model is then as it was.
        """
        who = "SimQAT.start_from"
        model = self._require_bound("start_from")
        if self.steps:
            raise RuntimeError(f"{who}: it must come before training, got {self.steps} steps done")
        with asked_by(who):
            start_from(model, self._layers, network_of(packed, who), who)

    def after_calibration(self) -> None:
        for name, layer in self._layers.items():
            layer.weight_quantizer.initialize(layer.folded_weight().detach())
            logger.debug("calibrated %s", name)

    def watch(self, model: nn.Module) -> None:
        layers = list(self._layers.values())
        self._watch = TrainingWatch(
            self.learned_parameters, lambda: [cast(nn.Parameter, layer._parameters["weight"]) for layer in layers]
        )

    def refuse_untrained(self) -> None:
        if self._watch is not None and self._watch.untrained():
            raise RuntimeError(
                "SimQAT.step: the learned steps of lsq must be trained, got none that moved while the weights did; "
                "make the optimizer after apply, or optimizer.add_param_group({'params': algo.learned_parameters()})"
            )

    def advance_schedule(self) -> None:
        """Updates the sigma of folded batch norms; ends quantization delays and freezes batch norms at their step."""
        for layer in self._layers.values():
            if isinstance(layer, Folded):
                layer.refresh()
        delays = dict(zip((ActivationQuantizer, WeightQuantizer), self.config.delays, strict=True))
        for quantizer in self._quantizers.values():
            if quantizer.gate is not None and self.steps == delays[type(quantizer)]:
                quantizer.gate.fill_(True)
        if self.config.freeze_bn is not None and self.steps == self.config.freeze_bn:
            for frozen in self._freezable:
                frozen.fill_(True)

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Replaces every trained layer by integer codes and scales, its batch norm by an identity; checks the outputs.

        Each layer is compared with the trained one on the same input, then the whole network on `example_inputs`
        (default: those of `apply`). `self.parity` holds the largest differences.

        Raises:
            RuntimeError: if the model is not prepared, is sharded, or a converted output differs from the trained one.
            ValueError: if a weight, a statistic, a range or what a layer sees is not finite.
        """
        return super().convert(model, example_inputs)

    def convert_layers(
        self, model: nn.Module, rows: list[PlanRow], example_inputs: Inputs
    ) -> tuple[Parity, list[PlanRow]]:
        trained = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantized | Quantizer | _BatchNorm)]
        refuse_nonfinite("SimQAT.convert", trained)
        return convert_model(model, rows, example_inputs)

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the quantized layers: schemes, bytes, and the arithmetic each one runs in."""
        return summary_of(network_of(model, "SimQAT.summary"))

    def learned_parameters(self) -> list[nn.Parameter]:
        """Returns the steps and zero points that `lsq` schemes added, for an optimizer that was made before `apply`."""
        self._require_bound("learned_parameters")
        return [p for quantizer in self._quantizers.values() for p in quantizer.parameters()]

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        rows = rows_of(entry["plan"], cls.row_settings)
        model = modularize_again(model, entry["modularized"])
        model = swap_layers(model, rows, SimQATConfig.from_dict(entry["config"]).options())
        if entry["stage"] == "converted":
            swap_converted_layers(model, rows)
        return model

    def _bind(self, model: nn.Module) -> None:
        super()._bind(model)
        self._freezable = [m.frozen for m in model.modules() if isinstance(getattr(m, "frozen", None), Tensor)]  # type: ignore[misc]

    def _unbind(self) -> None:
        super()._unbind()
        self._freezable = []
