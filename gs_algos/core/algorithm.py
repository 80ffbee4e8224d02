"""Defines the interface that every algorithm has, and how a model remembers what was done to it."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gs_algos.core.modules import TRACING
from gs_algos.core.network import wrapped_at
from gs_algos.core.plan import Plan, PlanRow
from gs_algos.core.plan_settings import RowSettings

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Migration: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
Loss = TypeVar("Loss", bound=Callable[..., Any])
HISTORY = "_golden_stick_history"
STAGES = ("prepared", "converted")
RESOURCES = ("process_group", "source", "teacher")  # of an algorithm: what lives in this process only
listeners: list[Callable[[nn.Module, dict[str, Any]], None]] = []  # called with a model and its new history entry


class Restores(Protocol):
    """Describes what `load` needs to restore an entry of a model's history.

    row_settings: the classes of the settings in the rows of its plan.
    migrations: version of a checkpoint -> function that puts an entry of it into the words of the next version.
    """

    row_settings: ClassVar[tuple[type[RowSettings], ...]]
    migrations: ClassVar[Mapping[int, Migration]]

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        """Gives a freshly built float model the structure that a history entry describes; `load` then fills it."""
        ...


@runtime_checkable
class Calibrates(Protocol):
    """Marks algorithms that set ranges from data between `apply` and the training: `isinstance(algo, Calibrates)`.

    SimQAT and SLB do, and so does any algorithm with such a method. For one that does not there is nothing to call.
    """

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Sets ranges from `batches` of inputs, or from what your own `forward_loop(model)` shows the model.

        Raises:
            RuntimeError: if `apply` was not called on this model.
            ValueError: if not exactly one of the two is given, or the model sees nothing, or what is not finite. The
                ranges are then as they were.
        """
        ...


class Algorithm(ABC):
    """Compresses a model in one way: `plan`, `apply`, `step` while training, `convert`.

    `plan(model, inputs)` says what would happen · `apply(model, inputs)` prepares the live model · `step()` after each
    optimizer step · `convert(model)` gives the compressed network, checked against the trained one · `summary(model)`.
    One that `Calibrates` also has `calibrate(model, batches)`, between `apply` and the first step.
    """

    name: ClassVar[str]
    row_settings: ClassVar[tuple[type[RowSettings], ...]] = ()  # of the rows of its plan; see `Restores`
    migrations: ClassVar[Mapping[int, Migration]] = {}
    trains: ClassVar[bool] = True  # False: `calibrate` does all that is done between `apply` and `convert`
    config: Any  # an `AlgorithmConfig`: each algorithm names its own class here
    steps: int  # optimizer steps since apply

    @abstractmethod
    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every layer, what will be done to it or why not; touches nothing."""

    @abstractmethod
    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Prepares the live model for training and returns it. Float state_dict keys stay as they are.

        Of a wrapper of torch.compile or DataParallel the network inside is prepared, and the wrapper returned.
        """

    @abstractmethod
    def step(self) -> None:
        """Advances schedules and updates observed ranges. Call it after every optimizer step, on every rank."""

    def loss(self, fn: Loss) -> Loss:
        """Returns the loss to train with; an algorithm without a term of its own returns `fn`."""
        return fn

    @abstractmethod
    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Replaces the trained layers by their compressed form, and raises if the outputs differ.

        Of a wrapper of torch.compile, DataParallel or DDP the network inside is converted and returned.
        """

    @abstractmethod
    def summary(self, model: nn.Module) -> str:
        """Returns a table of the compressed layers: bits, bytes, and the arithmetic each one runs in."""

    @property
    def calibrate_first(self) -> bool:
        """Says whether `calibrate`, before the first step, would improve on what `apply` alone could know."""
        return False

    def remember(
        self, model: nn.Module, stage: str, rows: Iterable[PlanRow] = (), steps: int = 0, **facts: Any
    ) -> dict[str, Any]:
        """Writes into the model's history what was done, which `save` keeps and `restore` and `resume` are given.

        Args:
            model: what `apply` or `convert` gives back.
            stage: "prepared" after `apply`, "converted" after `convert`.
            rows: of the plan.
            steps: optimizer steps since `apply`.
            facts: what else `restore` needs, as JSON has it.

        Returns:
            The entry in the history itself. An algorithm that can be resumed counts on in its `steps`.
        """
        if stage not in STAGES:
            raise ValueError(f"{type(self).__name__}.remember: stage must be {' or '.join(STAGES)}, got {stage!r}")
        plan = [row.to_dict() for row in rows]
        entry = {"algorithm": self.name, "stage": stage, "steps": steps, "config": self.config.to_dict(), "plan": plan}
        return remember(model, {**entry, **facts})

    def active(self) -> Algorithm:
        """Returns the algorithm that a model is trained with once `apply` is done: this one.

        One whose work ends there, such as a search, returns the algorithm that it has prepared the model with.
        """
        return self

    @classmethod
    def training_options(cls, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
        """Returns the options that tell an algorithm how long its training will be; {} if it need not know."""
        return {}

    @classmethod
    @abstractmethod
    def resume(cls, model: nn.Module) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back, at the step where it was saved."""

    @classmethod
    @abstractmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        """Gives a freshly built float model the structure that a history entry describes; `load` then fills it."""


def inner_of(algorithm: Algorithm) -> Algorithm:
    """Returns the algorithm that a wrapper such as Distill has as its `inner`, or the algorithm itself."""
    inner = getattr(algorithm, "inner", None)
    return algorithm if inner is None else inner_of(inner)


def share_resources(old: Algorithm, new: Algorithm) -> None:
    """Gives an algorithm what another one of its class has of this process, and no checkpoint holds."""
    for key in RESOURCES:
        if key in vars(old) or hasattr(type(old), key):
            setattr(new, key, getattr(old, key))
    if inner_of(old) is not old:
        share_resources(inner_of(old), inner_of(new))


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns (args, kwargs) of one call: of a tensor, a tuple of positional inputs, or a mapping of keyword inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def history(model: nn.Module) -> list[dict[str, Any]]:
    """Returns what was done to the model, oldest first: algorithm, stage (prepared or converted), config, plan, steps.

    A copy: what is written into it changes nothing of the model.
    """
    while (key := wrapped_at(model)) is not None:
        model = model.get_submodule(key)
    return copy.deepcopy(getattr(model, HISTORY, []))


def live_entry(model: nn.Module) -> dict[str, Any]:
    """Returns the newest entry of the model's history itself, in which a training counts its steps."""
    return model.__dict__[HISTORY][-1]


def prepared_entry(
    model: nn.Module,
    algorithm: str,
    who: str,
    must: str = "be one that apply prepared",
    todo: str = "call apply first",
) -> dict[str, Any]:
    """Returns the history entry of a model that an algorithm has prepared and not converted yet.

    Raises:
        RuntimeError: `<who>: the model must <must>, got ...; <todo>` if there is none.
    """
    entry = history(model)[-1] if history(model) else {}
    if entry.get("algorithm") != algorithm or entry.get("stage") != "prepared":
        got = f"one that is {entry.get('stage', 'float')}"
        if entry.get("stage") == "prepared":
            got = f"one that is prepared by {entry['algorithm']}"
        inside = next((name for name, m in model.named_modules() if name and HISTORY in m.__dict__), None)
        if not entry and inside is not None:
            got, todo = f"{got} around one that is not", f"pass the module inside, .{inside}"
        raise RuntimeError(f"{who}: the model must {must}, got {got}; {todo}")
    return entry


def refuse_prepared(model: nn.Module, who: str) -> None:
    """Raises RuntimeError if an algorithm is still training the model, whose layers must keep their form until then."""
    entry = history(model)[-1] if history(model) else {}
    if entry.get("stage") == "prepared":
        before = entry["algorithm"]
        raise RuntimeError(f"{who}: the model must be trained, got one that {before} prepared; convert it first")


def resumable_entry(model: nn.Module, algorithm: str, who: str) -> dict[str, Any]:
    """Returns the history entry of a model that was saved while an algorithm trained it.

    Raises:
        RuntimeError: if it was not.
    """
    must = f"be one that was saved while prepared by {who}"
    return prepared_entry(model, algorithm, f"{who}.resume", must, "load a checkpoint from before convert")


def remember(model: nn.Module, entry: dict[str, Any], replaces: str | None = None) -> dict[str, Any]:
    """Appends a copy to the model's history, and returns it; one of the same algorithm, only prepared, is replaced.

    replaces: another algorithm, whose prepared entry this one replaces.
    """
    entries = list(getattr(model, HISTORY, []))
    replaced = (entry["algorithm"], replaces)
    if entries and entries[-1]["algorithm"] in replaced and entries[-1]["stage"] == "prepared":
        entries.pop()
    model.__dict__[HISTORY] = [*entries, copy.deepcopy(entry)]
    for listener in listeners:
        listener(model, entry)
    return live_entry(model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the block in eval mode without gradients; every module's own training flag is put back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Runs the block without gradients of parameters; those of tensors between layers are computed."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class InputsError(ValueError):
    """Says that inputs do not run through a model. text: what is wrong, without who says so."""

    def __init__(self, who: str, text: str) -> None:
        super().__init__(f"{who}: {text}")
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self).removesuffix(f": {self.text}"), self.text)


@contextlib.contextmanager
def asked_by(who: str) -> Iterator[None]:
    """Makes an `InputsError` from inside name what the user called, e.g. who="SimQAT.apply"."""
    try:
        yield
    except InputsError as error:
        raise InputsError(who, error.text) from error.__cause__


def run(model: nn.Module, inputs: Inputs, who: str) -> Any:
    """Calls `model(inputs)`; an error becomes an InputsError that names the caller."""
    args, kwargs = split_inputs(inputs)
    try:
        with TRACING:
            return model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise InputsError(
            who, f"the inputs must run through the model, got {describe_error(error)}{hint(inputs, error)}"
        ) from error


def describe_error(error: BaseException) -> str:
    """Returns the class of an error and the first line of its text, for the message of another one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def hint(inputs: Any, error: Exception) -> str:
    """Returns `; what to do` about inputs that do not run through a model, if the mistake is a common one; else ""."""
    if isinstance(inputs, tuple | list) and isinstance(error, TypeError) and "positional arg" in str(error):
        return "; a tuple is positional inputs: leave labels out"
    is_inputs = isinstance(inputs, Tensor | tuple | list | Mapping | str) or hasattr(inputs, "__array__")
    if not is_inputs and hasattr(inputs, "__iter__"):
        return "; give the inputs of one call, those of next(iter(loader))"
    if hasattr(inputs, "__array__") and not isinstance(inputs, Tensor):
        return "; give a tensor, torch.from_numpy(x)"
    return ""
