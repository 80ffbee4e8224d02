"""Runs algorithms one after the other on one live model: prune, then quantize, each from where the last ended.

A folder keeps what is needed to go on after an interruption: the network at the start, the checkpoint of every finished
stage, and the prepared network of the one that is running.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import nn

from gs_algos.core.algorithm import Algorithm, Inputs, inner_of, share_resources
from gs_algos.core.arguments import as_path, refuse_file
from gs_algos.core.checkpoint import load, save
from gs_algos.core.files import write_atomically
from gs_algos.core.plan import Plan

logger = logging.getLogger(__name__)

FORMAT = "golden-stick-pipeline"
VERSION = 1
INDEX = "pipeline.json"
START = "start.safetensors"


@dataclass(frozen=True)
class Stage:
    """Is one algorithm of a pipeline while its network is trained.

    Args:
        number: from 1.
        algorithm: the live one, already applied; `algorithm.steps` says where a resumed stage goes on.
        folder: where the stage may keep a training state of its own; None if the pipeline has no folder.
        resumed: True if the stage had begun before.
    """

    number: int
    algorithm: Algorithm
    folder: Path | None
    resumed: bool

    @property
    def name(self) -> str:
        """Returns a name such as `1-scop`, also of a SCOP that Distill wraps."""
        return f"{self.number}-{inner_of(self.algorithm).name}"

    def save(self, net: nn.Module) -> None:
        """Keeps the prepared network as it is now: a resumed pipeline goes on from here. Optimizer state is yours.

        Raises:
            RuntimeError: if the pipeline has no folder.
        """
        if self.folder is None:
            raise RuntimeError("Pipeline: a stage can be saved if the pipeline has a folder, got folder=None")
        save(net, self.folder / "prepared")


class Plans(tuple[Plan, ...]):
    """Holds the plan of each stage, in order. `str(plans)` shows one below the other, a notebook too."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return "\n".join(plan._repr_html_() for plan in self)


Train: TypeAlias = Callable[[nn.Module, Stage], None]
After: TypeAlias = Callable[[nn.Module, Stage], None]


class Pipeline:
    """Runs algorithms in order: each is applied, trained by your function, converted and saved before the next begins.

    ```python
    def train(net, stage):  # your own loop: stage.algorithm.loss and stage.algorithm.step in it
        ...

    pipeline = Pipeline([SCOP(rate=0.45, select_steps=500), SimQAT()], folder="out")
    net = pipeline.run(net, example_inputs, train)
    net = pipeline.resume(build_model, example_inputs, train)  # after an interruption, in another process
    net = gs_algos.load("out/2-simqat", build_model)  # the original, unpruned builder
    ```
    """

    def __init__(self, algorithms: Iterable[Algorithm], folder: str | os.PathLike[str] | None = None) -> None:
        if isinstance(algorithms, Algorithm | str) or not isinstance(algorithms, Iterable):
            raise TypeError(f"Pipeline: algorithms must be a list such as [SCOP(), SimQAT()], got {algorithms!r:.60}")
        algorithms = list(algorithms)
        if not algorithms:
            raise ValueError("Pipeline: at least one algorithm must be given, got none")
        for algorithm in algorithms:
            if not isinstance(algorithm, Algorithm):
                raise TypeError(f"Pipeline: every stage must be an algorithm such as SimQAT(), got {algorithm!r:.60}")
        if len({id(algorithm) for algorithm in algorithms}) < len(algorithms):
            raise ValueError("Pipeline: every stage must be an object of its own, got one twice")
        self.algorithms = algorithms
        self.folder = None if folder is None else as_path(folder, "Pipeline: folder")
        if self.folder is not None:
            refuse_file(self.folder, "Pipeline: folder")
        self._stages = self._stack()  # as they were given: a search changes the rules of its own

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plans:
        """Plans every stage on the network as it is now, and touches nothing.

        A rule that matches nothing, or inputs that do not run, are found before the first stage is trained. A later
        stage will meet what the earlier ones leave: fewer channels, so fewer bytes than its plan says here.

        Raises:
            ValueError: what the plan of a stage raises, with the stage in front.
        """
        plans = []
        for number, algorithm in enumerate(self.algorithms, 1):
            try:
                plans.append(algorithm.plan(model, example_inputs))
            except ValueError as error:
                raise ValueError(f"Pipeline.plan: stage {number}: {error}") from error
        return Plans(plans)

    def run(self, model: nn.Module, example_inputs: Inputs, train: Train, after: After | None = None) -> nn.Module:
        """Runs every stage from the first. An older run in the folder is started anew.

        Args:
            model: the live network; what comes back is the same object unless an algorithm says otherwise.
            example_inputs: what the network is prepared and compared on in every stage.
            train: trains the prepared network in place.
            after: called with every converted network.

        Raises:
            ValueError: if the folder holds something that is no pipeline, or what an algorithm raises.
        """
        if self.folder is not None:
            if self.folder.exists() and not (self.folder / INDEX).is_file() and any(self.folder.iterdir()):
                raise ValueError(f"Pipeline: the folder must be new, empty or a pipeline's, got {self.folder}")
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {key: t.detach().cpu().contiguous().clone() for key, t in model.state_dict().items()}
            write_atomically(self.folder / START, to_bytes(state))
            self._write(done=0, began=False)
        return self._from(1, model, example_inputs, train, after, None)

    def resume(
        self,
        build_model: Callable[[], nn.Module],
        example_inputs: Inputs,
        train: Train,
        after: After | None = None,
    ) -> nn.Module:
        """Runs the unfinished stages from the last state in the folder. `build_model` makes the float network.

        A stage that had begun goes on from its last `save`, or from its start.

        Raises:
            ValueError: if the folder holds no pipeline of these algorithms and options, or the model does not fit.
        """
        done, began = self._read()
        assert self.folder is not None
        if began:
            model = load(self._part(done + 1) / "prepared", build_model)
            return self._from(done + 1, model, example_inputs, train, after, self._resumed(done, model, build_model))
        return self._from(done + 1, self._before(done, build_model), example_inputs, train, after, None)

    def _from(
        self,
        first: int,
        model: nn.Module,
        example_inputs: Inputs,
        train: Train,
        after: After | None,
        resumed: Algorithm | None,
    ) -> nn.Module:
        for number in range(first, len(self.algorithms) + 1):
            algorithm = resumed if number == first and resumed is not None else self.algorithms[number - 1]
            stage = Stage(number, algorithm, None if self.folder is None else self._part(number), algorithm is resumed)
            logger.info("stage %s of %d", stage.name, len(self.algorithms))
            if algorithm is not resumed:
                model = algorithm.apply(model, example_inputs)
                stage = replace(stage, algorithm=algorithm.active())
                if stage.folder is not None:
                    shutil.rmtree(stage.folder, ignore_errors=True)
                    stage.save(model)
                    self._write(done=number - 1, began=True)
            train(model, stage)
            model = stage.algorithm.convert(model, example_inputs)
            if stage.folder is not None:
                save(model, self._folder(number))
                self._write(done=number, began=False)
                shutil.rmtree(stage.folder)
            if after is not None:
                after(model, stage)
        return model

    def folders(self) -> list[Path]:
        """Returns the folder of each stage's network, in order. The pipeline has a folder."""
        return [self._folder(number) for number in range(1, len(self.algorithms) + 1)]

    def _folder(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number}-{inner_of(self.algorithms[number - 1]).name}"

    def _part(self, number: int) -> Path:
        """Returns the folder where a stage keeps what it needs until it is finished."""
        return self._folder(number).with_suffix(".part")

    def _resumed(self, index: int, model: nn.Module, build_model: Callable[[], nn.Module]) -> Algorithm:
        """Resumes the algorithm of a prepared model, with what the stage's own has and no checkpoint holds."""
        given: Any = self.algorithms[index]
        algorithm: Any = type(given.active()).resume(model)
        share_resources(given.active(), algorithm)
        if getattr(algorithm, "teacher", "none needed") is None:
            algorithm.teacher = self._before(index, build_model)  # a copy of which was the teacher
        return algorithm

    def _before(self, done: int, build_model: Callable[[], nn.Module]) -> nn.Module:
        """Makes the network that the first `done` stages have left."""
        return self._started(build_model) if done == 0 else load(self._folder(done), build_model)

    def _started(self, build_model: Callable[[], nn.Module]) -> nn.Module:
        """Builds the float network with the values that `run` was given."""
        assert self.folder is not None
        path = self.folder / START
        model = build_model()
        try:
            model.load_state_dict(from_bytes(path.read_bytes()))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"Pipeline: {path} must hold the network that build_model makes, got: {reason}") from error
        return model

    def _stack(self) -> list[dict[str, Any]]:
        """Returns the stages as JSON, to tell whether a folder is of this pipeline."""
        return json.loads(json.dumps([_facts(algorithm) for algorithm in self.algorithms], default=_text))

    def _write(self, done: int, began: bool) -> None:
        assert self.folder is not None
        index = {"format": FORMAT, "version": VERSION, "stages": self._stages, "done": done, "began": began}
        write_atomically(self.folder / INDEX, json.dumps(index, indent=1).encode())

    def _read(self) -> tuple[int, bool]:
        """Reads (finished stages, whether the next one had begun) from the folder.

        Raises:
            ValueError: if it holds no pipeline of these stages.
        """
        if self.folder is None:
            raise ValueError("Pipeline.resume: the pipeline must have a folder, got folder=None")
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"Pipeline.resume: {path} must be a pipeline's JSON, got {error}") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            raise ValueError(
                f"Pipeline.resume: {path} must be of format {FORMAT!r} version {VERSION}, got another file"
            )
        done, began, theirs = index.get("done"), index.get("began"), index.get("stages")
        if isinstance(theirs, list) and len(theirs) == len(self.algorithms):
            theirs = [*map(_with_defaults, theirs, self.algorithms)]
        if theirs != self._stages:
            got = _difference(theirs, self._stages)
            raise ValueError(f"Pipeline.resume: the stages must be those of the run in {self.folder}, got {got}")
        if type(done) is not int or not 0 <= done <= len(self.algorithms) or type(began) is not bool:
            raise ValueError(f"Pipeline.resume: {path} must count finished stages, got {done!r} and {began!r}")
        return done, began and done < len(self.algorithms)


def _facts(algorithm: Algorithm) -> dict[str, Any]:
    """Describes an algorithm, and what it wraps."""
    inner = getattr(algorithm, "inner", None)
    more = {} if inner is None else {"inner": _facts(inner)}
    return {"algorithm": algorithm.name, "config": algorithm.config.to_dict(), **more}


def _with_defaults(stage: Any, algorithm: Algorithm) -> Any:
    """Returns a stage of a folder with the defaults of options that there were none of when it was written."""
    if not isinstance(stage, dict) or not isinstance(config := stage.get("config"), dict):
        return stage
    options = {**json.loads(json.dumps(type(algorithm.config)().to_dict(), default=_text)), **config}
    inner = getattr(algorithm, "inner", None)
    more = {} if inner is None else {"inner": _with_defaults(stage.get("inner"), inner)}
    return {**stage, "config": options, **more}


def _difference(theirs: Any, ours: list[dict[str, Any]]) -> str:
    """Describes the first stage that differs."""
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return f"{len(ours)} of them, it has {len(theirs) if isinstance(theirs, list) else 'none'}"
    for number, (old, new) in enumerate(zip(theirs, ours, strict=True), 1):
        before = old.get("config") if isinstance(old, dict) and old.get("algorithm") == new["algorithm"] else None
        if not isinstance(before, dict):
            return f"{new['algorithm']} as stage {number}"
        options = [f"{key}={value!r}" for key, value in new["config"].items() if before.get(key) != value]
        if options:
            return f"stage {number} {new['algorithm']} with {', '.join(options)}"
        if old.get("inner") != new.get("inner"):
            return f"stage {number} {new['algorithm']} around {json.dumps(new.get('inner'))}"
    return "other ones"


def _text(value: Any) -> str:
    """Makes JSON of a module class in a rule."""
    return f"type:{value.__name__}" if isinstance(value, type) else repr(value)
