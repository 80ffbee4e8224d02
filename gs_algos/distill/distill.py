"""Trains by distillation: the student answers as its teacher does, while another algorithm compresses it, or none.

The loss is `labels * yours + logits * T^2 * KL(teacher || student) + features * (sum over pairs of layers)`. Hinton et
al. 2015, arXiv:1503.02531; the terms on layers are those of `gs_algos.distill.losses`. The teacher is a frozen copy of
the network as it was before, unless another is given; or one that is trained at the same time, a twin (Xu et al. 2020,
arXiv:2009.13044). Hooks record what the student is given, because a loss sees no inputs; `convert` takes off all that
was added, and the history is then that of the inner algorithm alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from gs_algos.core.algorithm import (
    HISTORY,
    Algorithm,
    Inputs,
    Loss,
    asked_by,
    evaluating,
    history,
    inner_of,
    prepared_entry,
    resumable_entry,
)
from gs_algos.core.batches import device_of
from gs_algos.core.modules import all_or_nothing
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors, without_autocast
from gs_algos.core.plan import Plan
from gs_algos.core.registry import algorithm_class
from gs_algos.core.training import TrainingAlgorithm
from gs_algos.distill.config import DistillConfig, DistillOptions
from gs_algos.distill.losses import feature_loss, first_projection, logit_sum
from gs_algos.distill.parts import sum_of_parts
from gs_algos.distill.recorder import Batch, Recorder, feature_of, recording, remove_recorders
from gs_algos.distill.teacher import Pairs, check_teacher, logits_of, teacher_from
from gs_algos.distill.twin import Fact, check_trainable, facts_of, hold, release, tie
from gs_kernels.runtime.torch_private import tree_map_only

PROJECTION, WIDTHS = "distill_projection_{}", "distill_widths_{}"  # parameters of the root of a prepared model


class Distill(TrainingAlgorithm):
    """Trains a network, and what an inner algorithm makes of it, to answer as a teacher does.

    ```python
    algo = Distill(SimQAT(weight="int2@channel"))
    net = algo.apply(net, example_inputs)  # the teacher: a frozen copy of net as it is now
    loss_fn = algo.loss(nn.functional.cross_entropy)
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    The other options are those of `DistillConfig`, by keyword. What an inner algorithm has beside, such as `calibrate`,
    is called on this one.

    Args:
        inner: what compresses the network; None only trains it.
        teacher: runs in eval mode without gradients, and stays as it is; None for a copy of the network, made at
            `apply`. With `train_teacher` it is trained: in the mode of the student, by your own loss.
    """

    name: ClassVar[str] = "distill"
    config_class: ClassVar[type[DistillConfig]] = DistillConfig
    config: DistillConfig

    def __init__(
        self,
        inner: Algorithm | None = None,
        teacher: nn.Module | None = None,
        config: DistillConfig | None = None,
        **options: Unpack[DistillOptions],
    ) -> None:
        if inner is not None and not isinstance(inner, Algorithm):
            raise TypeError(f"Distill: inner must be an algorithm such as SimQAT(), or None, got {inner!r:.60}")
        if isinstance(inner, Distill):
            raise TypeError("Distill: inner must be an algorithm that compresses, got another Distill")
        if inner is not None and not inner.trains:
            raise TypeError(f"Distill: inner must be an algorithm that trains, got {type(inner_of(inner)).__name__}")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"Distill: teacher must be a nn.Module, got {type(teacher).__name__}")
        super().__init__(config, **options)
        self.inner, self.teacher = inner, teacher
        self._copied = False  # the teacher is a copy of ours
        self._steps = 0
        self._pairs: Pairs = ()
        self._recorder = Recorder()

    def __getattr__(self, name: str) -> Any:
        """Gives what only the inner algorithm has."""
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(inner, name)

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self._steps if self.inner is None else self.inner.steps

    @steps.setter
    def steps(self, value: int) -> None:
        """Continues a resumed training at a step; the tensors of the model are already those of that step."""
        self._steps = value
        if self.inner is not None:
            self.inner.steps = value

    @property
    def calibrate_first(self) -> bool:
        return self.inner is not None and self.inner.calibrate_first

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists what the inner algorithm will do; touches nothing, and checks the teacher on the example inputs.

        Raises:
            ValueError: as `apply`.
        """
        with ordinary_tensors(), asked_by("Distill.plan"):
            network = network_of(model, "Distill.plan")
            check_teacher(self.config, network, self.teacher, example_inputs, "Distill.plan")
            if self.config.train_teacher:
                check_trainable(network if self.teacher is None else self.teacher, "Distill.plan")
        if self.inner is None:
            return Plan(self.name, "", (), ("nothing is compressed: the network is trained by its teacher",))
        return self.inner.plan(model, example_inputs)

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Copies the teacher if none was given, has the inner algorithm prepare the live model, and adds its hooks.

        Where channels of compared layers differ, and for kind `kernel`, the root of the model gets parameters, for an
        optimizer that is made after this; `feature_parameters()` returns them. So it gets the parameters of a teacher
        that is trained, which are those of the teacher itself.

        Raises:
            RuntimeError: if the model is already prepared or converted by the inner algorithm.
            ValueError: if the teacher is the student, is not finite, or gives logits of another shape, a named layer is
                missing, or two outputs are of different sizes; or as the inner algorithm's. The model is then as it
                was.
            TypeError: if the network returns no logits.
        """
        who = "Distill.apply"
        network = network_to_train(model, who)
        if history(network) and history(network)[-1]["stage"] == "prepared":
            raise RuntimeError(f"{who}: the model is still prepared by {history(network)[-1]['algorithm']}; convert it")
        with ordinary_tensors(), asked_by(who):
            pairs, channels = check_teacher(self.config, network, self.teacher, example_inputs, who)
            teacher = teacher_from(network, self.config.train_teacher) if self.teacher is None else self.teacher
            twin: list[Fact] = []
            if self.config.train_teacher:
                check_trainable(teacher, who)
                twin = facts_of(network_of(teacher, f"{who}: teacher"))
            with all_or_nothing(network):
                if self.inner is not None:
                    model = self.inner.apply(model, example_inputs)
                prepared = network_of(model, who)
                shapes = _parameter_shapes(self.config.kind, pairs, channels)
                _add_parameters(prepared, shapes)
                hold(prepared, twin, network_of(teacher, f"{who}: teacher"))
                self._copied, self.teacher = self._copied or self.teacher is None, teacher
                self._bind(prepared, pairs)
                facts = {"pairs": [list(pair) for pair in pairs], "parameters": shapes, "twin": twin}
                self._history = self.remember(prepared, "prepared", **facts)
        self._steps = 0
        return model

    def step(self) -> None:
        """Forgets the last forward, and advances the inner algorithm. After every optimizer step, on every rank.

        Raises:
            RuntimeError: if `apply` was not called.
        """
        self._require_bound("step")
        self._recorder.clear()
        self._steps += 1
        if self.inner is not None:
            self.inner.step()
        self._history["steps"] = self.steps

    def loss(self, fn: Loss) -> Loss:
        """Returns the loss to train with: called as `fn`, once behind each forward of the model, with what it returned.

        A teacher that is trained adds `fn` of what it returns itself, and needs targets. With `target=None` there is no
        term on labels. Of language models a position counts where the student's input `attention_mask` is not 0. While
        SCOP decides what to cut, only logits are distilled, and no teacher is trained.

        Raises:
            RuntimeError: when it is called, if no forward came before or `apply` was not called, or no gradient reaches
                a compared layer.
            ValueError: when it is called, if the outputs are not those of the model, or a teacher that is trained gets
                no targets.
        """

        def distilled(output: Any, target: Any = None, *args: Any, **options: Any) -> Tensor:
            if self.config.train_teacher and target is None:
                raise ValueError(
                    "Distill.loss: a teacher that is trained must have targets, got None; give them, or leave "
                    "train_teacher out"
                )
            total = self._distilled(output, lambda taught: fn(taught, target, *args, **options))
            if self.config.labels and target is not None:
                total = total + self.config.labels * fn(output, target, *args, **options)
            return total

        own = cast(Loss, distilled)
        return own if self.inner is None else self.inner.loss(own)

    def _distilled(self, output: Any, own: Callable[[Any], Tensor]) -> Tensor:
        """Returns the terms on logits and on features. own: the loss of a teacher that is trained, which is added."""
        model = self._require_bound("loss")
        seen = self._recorder
        if seen.inputs is None:
            raise RuntimeError("Distill.loss: a forward of the model must come before, got none; call net(x) first")
        logits = logits_of(output, "Distill.loss")
        selecting = getattr(self.inner, "selecting", False)
        pairs = () if selecting else self._pairs
        teacher, sites = self._teacher_on(logits.device), dict.fromkeys(theirs for _, theirs in pairs)
        with recording(teacher, sites) as taught:
            if self.config.train_teacher and not selecting:
                args, options = seen.inputs
                answer = teacher.train(model.training)(*args, **options)
                total = self._logit_term(logits, lambda *_, **__: answer, seen.inputs) + own(answer)
            else:
                total = self._logit_term(logits, partial(_asked, teacher), seen.inputs)
        with without_autocast():
            for number, (mine, theirs) in enumerate(pairs):
                student = feature_of(seen.features.get(mine), mine, "Distill.loss")
                if torch.is_grad_enabled() and not student.requires_grad:
                    raise RuntimeError(
                        f"Distill.loss: a gradient must reach the layers that are compared, got none at {mine}; in "
                        "gradient checkpointing set use_reentrant=False"
                    )
                parameters = (model._parameters.get(name.format(number)) for name in (PROJECTION, WIDTHS))
                teacher_feature = feature_of(taught.features.get(theirs), theirs, "Distill.loss: teacher").detach()
                term = feature_loss(self.config.kind, student, teacher_feature, *parameters)
                total = total + self.config.features * term
        return total

    def _logit_term(self, logits: Tensor, ask: Callable[..., Any], inputs: Batch) -> Tensor:
        """Asks the teacher on the inputs, some at a time if the options say so; returns the weighted term on logits."""
        axis, count, rows = self.config.axis, len(logits), self.config.teacher_rows
        mask = inputs[1].get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == logits.movedim(axis, -1).shape[:-1] else None

        def part_of(t: Tensor, part: slice) -> Tensor:
            return t[part] if t.dim() and len(t) == count else t

        def term(student: Tensor, part: slice) -> Tensor:
            args, options = tree_map_only(Tensor, lambda t: part_of(t, part), inputs)
            taught = logits_of(ask(*args, **options), "Distill.loss: teacher").detach()
            if taught.shape != student.shape:
                raise ValueError(
                    "Distill.loss: the outputs must be what the model returned in its last forward, of the teacher's "
                    f"shape {list(taught.shape)}, got {list(student.shape)}; shift or flatten inside of your loss"
                )
            if not self.config.logits:
                return torch.zeros((), device=logits.device)
            own, wanted = (t.movedim(axis, -1) for t in (student, taught))
            own_mask = None if mask is None else mask[part]
            with without_autocast():
                return logit_sum(own, wanted, self.config.temperature, self.config.standardize, own_mask)

        total = term(logits, slice(None)) if rows is None else sum_of_parts(logits, term, rows)
        rows_in_all = logits.movedim(axis, -1)[..., 0].numel() if mask is None else mask.sum().clamp(min=1)
        return self.config.logits * (total / rows_in_all)

    def _teacher_on(self, device: torch.device) -> nn.Module:
        """Returns the network of the teacher, on a device: a copy of ours moves there, one that was given must be."""
        if self.teacher is None:
            raise RuntimeError(
                "Distill.loss: a resumed distillation must have its teacher, got none; set algo.teacher to the network "
                "that it began with"
            )
        network = network_of(self.teacher, "Distill.loss: teacher")
        if self.config.train_teacher:
            tie(self._require_bound("loss"), self._history["twin"], network, "Distill.loss")
            return network
        if device_of(network) not in (None, device):
            if not self._copied:
                raise ValueError(
                    f"Distill.loss: the teacher must be on the student's device, {device}, got {device_of(network)}; "
                    "move it"
                )
            network.to(device)
        return network if self._pairs else self.teacher

    def feature_parameters(self) -> list[nn.Parameter]:
        """Returns the 1x1 and widths that `apply` added, for an optimizer that was made before it."""
        model = self._require_bound("feature_parameters")
        found = (model._parameters.get(name) for name in self._history["parameters"])
        return [parameter for parameter in found if parameter is not None]

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None, **options: Any) -> nn.Module:
        """Takes off all that `apply` added, and has the inner algorithm convert the model.

        options: of the inner algorithm's `convert`.

        Raises:
            RuntimeError: if the model is not prepared by this algorithm; or as the inner algorithm's. The model is then
                as it was.
        """
        who = "Distill.convert"
        network = network_of(model, who)
        entry = prepared_entry(network, self.name, who)
        own = network is self._model
        if self.inner is None and not own and self._model is None:
            raise RuntimeError(
                f"{who}: the model must be the one that the algorithm trains, got another, or it is done"
            )
        with all_or_nothing(network):
            network.__dict__[HISTORY] = network.__dict__[HISTORY][:-1]
            remove_recorders(network)
            for name in entry["parameters"]:
                del network._parameters[name]
            release(network, entry.get("twin", []))
            if self.inner is not None:
                network = self.inner.convert(network, example_inputs, **options)
            else:
                self.remember(network, "converted", steps=self.steps)
        if own:  # a copy may be converted while the training of the original goes on
            self._model, self._pairs, self._recorder = None, (), Recorder()
            self.teacher, self._copied = (None if self._copied else self.teacher), False
        return network

    def summary(self, model: nn.Module) -> str:
        """Returns the table of the inner algorithm."""
        return "distill: nothing is compressed" if self.inner is None else self.inner.summary(model)

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back, at the step where it was saved.

        A checkpoint holds no teacher: set `teacher` to the network that the training began with. Of one that is trained
        it holds the tensors: set `teacher` to a network of its form, which then computes with them.

        Raises:
            RuntimeError: if the model was not saved while prepared.
        """
        network = network_of(model, "Distill.resume")
        entry = resumable_entry(network, cls.name, "Distill")
        entries = network.__dict__[HISTORY]
        inner = None
        if entry["inner"] is not None:
            network.__dict__[HISTORY] = entries[:-1]
            try:
                inner = algorithm_class(entry["inner"]).resume(network)
            finally:
                network.__dict__[HISTORY] = entries
        algo = cls(inner, config=DistillConfig.from_dict(entry["config"]))
        algo._history = entries[-1]
        algo._bind(network, tuple((own, theirs) for own, theirs in entry["pairs"]))
        algo._steps = entry["steps"]
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        if entry["stage"] == "prepared":
            _add_parameters(model, entry["parameters"])
            hold(model, entry.get("twin", []))
        return model

    def remember(self, *args: Any, **facts: Any) -> dict[str, Any]:
        # a search leaves what it searched for
        return super().remember(*args, **facts, inner=None if self.inner is None else self.inner.active().name)

    def _bind(self, model: nn.Module, pairs: Pairs) -> None:
        self._model, self._pairs = model, pairs
        remove_recorders(model)  # a model that was pickled has those of its old algorithm
        self._recorder = Recorder(dict.fromkeys(own for own, _ in pairs))
        self._recorder.attach(model)


def _asked(teacher: nn.Module, *args: Any, **options: Any) -> Any:
    """Returns what a teacher gives in eval mode, without gradients."""
    with evaluating(teacher):
        return teacher(*args, **options)


def _parameter_shapes(kind: str, pairs: Pairs, channels: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    """Returns name -> shape of what the terms on layers have to learn."""
    shapes: dict[str, list[int]] = {}
    for number, (own, _) in enumerate(pairs):
        mine, theirs = channels[own]
        if kind == "kernel" or (kind == "mse" and mine != theirs):
            shapes[PROJECTION.format(number)] = [theirs, mine]
        if kind == "kernel":
            shapes[WIDTHS.format(number)] = [2]
    return shapes


def _add_parameters(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Gives the root of a model these parameters: not a module, which a Sequential would run."""
    device = device_of(model)
    for name, shape in shapes.items():
        value = torch.ones(2) if len(shape) == 1 else first_projection(*shape)
        model.register_parameter(name, nn.Parameter(value.to(device)))
