"""Saves and loads a compressed or prepared model: one safetensors file and one JSON, never pickle.

`golden_stick.json` names the tensor file, whose name no other save ever takes, so replacing the JSON (atomic) is what
makes a new checkpoint valid: a save that is killed leaves the old one whole, and of two at once the last one counts.
A tensor file that the JSON does not name and that nobody is writing is deleted by the next save. A reader that finds
its tensor file gone reads the JSON anew.

    {"format": "golden-stick", "version": 2,
     "history": [{"algorithm": "simqat", "stage": "prepared", "steps": 1000, "config": {"weight": "int8@channel", ...},
                  "plan": [{"site": "conv1", "kind": "Conv2d", "action": "quantize Conv2d + BatchNorm2d",
                            "detail": "...", "reason": "", "settings": {"form": "layer", "weight": "...", ...}},
                           {"site": "embed", "kind": "Embedding", "action": "keep", "detail": "", "reason": "...",
                            "settings": null}],
                  ...}],
     "tensors": {"file": "model-<16 hexadecimal digits>.safetensors", "sha256": "...", "nbytes": 102400},
     "aliases": {"head.weight": "embed.weight"}}

`history` has an entry for each algorithm that the network went through, oldest first, with `plan`: one row for each
layer. What `settings` holds is a frozen dataclass of the algorithm (`Algorithm.row_settings`); `form` says which. Other
fields of an entry are the algorithm's own. `aliases` are names of tensors that share the memory of another.

Version 1 had the same fields; its `settings` had other names in them, no `form`, and were `{}` for `null`. A file of an
earlier version is put into the words of this one as it is read (`Algorithm.migrations`), and saved in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gs_algos.core.algorithm import HISTORY, STAGES, history, remember
from gs_algos.core.arguments import as_path, refuse_file
from gs_algos.core.files import abandoned, remove, sha256, write_atomically, written
from gs_algos.core.modules import all_or_nothing
from gs_algos.core.network import names_inside, network_of, ordinary_tensors, plain_names, without_wrappers, wrapped_at
from gs_algos.core.plan import PlanRow, rows_of, with_settings
from gs_algos.core.registry import UnknownAlgorithmError, restorer
from gs_algos.core.tensor_rules import refuse_values

FORMAT = "golden-stick"
VERSION = 2
INDEX = "golden_stick.json"
FIELDS = {"format", "version", "history", "tensors", "aliases"}
TENSOR_FILE = re.compile(r"model-[0-9a-f]{16}\.safetensors")
DRAFT = re.compile(rf"\.({TENSOR_FILE.pattern}|{re.escape(INDEX)})\.[0-9a-f]{{16}}")
MOST_STEPS = 2**53  # of a training: a float holds each
ATTEMPTS = 100  # to read a checkpoint that is replaced while it is read
T = TypeVar("T")
Facts: TypeAlias = dict[str, Any]
# what a restore can trip over if the history is not of the network that build_model makes
LOAD_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes the model's tensors and history into `directory`, which is made if needed. Exact, prepared or converted.

    Raises:
        ValueError: if no algorithm was applied to the model, or a tensor is sharded or has no data.
        TypeError: if the model is no module or the directory no path.
        OSError: if a file is where the folder would be, or it cannot be written.
    """
    model = network_of(model, "save")
    folder = as_path(directory, "save: directory")
    refuse_file(folder, "save: directory")
    if not history(model):
        raise ValueError("save: the model must have been through an algorithm's apply, got one without history")
    tensors, aliases = unique_tensors(model)
    data = to_bytes(tensors)
    name = f"model-{secrets.token_hex(8)}.safetensors"
    index = {
        "format": FORMAT,
        "version": VERSION,
        "history": plain_names(history(model)),
        "tensors": {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)},
        "aliases": aliases,
    }
    text = json.dumps(index, indent=1).encode()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with written(folder / name, data):  # nobody deletes it before the JSON names it
            write_atomically(folder / INDEX, text)
    except BaseException:
        if _named(folder) not in (name, None):
            remove(folder / name)
        raise
    _clear(folder)
    return folder


def _clear(folder: Path) -> None:
    """Deletes what killed or replaced saves have left: nobody will name such a file again."""
    for path in folder.iterdir():
        ours = DRAFT.fullmatch(path.name) or TENSOR_FILE.fullmatch(path.name)
        # in this order: a file without a writer is never named later than now
        if ours and abandoned(path) and _named(folder) not in (path.name, None):
            remove(path)


def _named(folder: Path) -> str | None:
    """Returns the tensor file of the checkpoint in the folder now, "" if there is none, None if that is unknown."""
    try:
        return json.loads((folder / INDEX).read_bytes())["tensors"]["file"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError):
        return None


def load(directory: str | os.PathLike[str], build_model: Callable[[], nn.Module]) -> nn.Module:
    """Loads a saved model: `build_model()` makes the float network, the saved history reshapes it, the tensors fill it.

    Raises:
        ValueError: if the folder is no checkpoint, is of a newer version, is damaged, or does not fit the built model.
        TypeError: if `build_model` is not a function that returns a module.
    """
    if isinstance(build_model, nn.Module):
        raise TypeError(
            "load: build_model must be a function that makes the float network, got the network itself; "
            "give its class or a lambda"
        )
    if not callable(build_model):
        raise TypeError(
            f"load: build_model must be a function that makes the float network, got {build_model!r:.60}; give a lambda"
        )
    with ordinary_tensors():
        return _load(as_path(directory, "load: directory"), build_model)


def _load(folder: Path, build_model: Callable[[], nn.Module]) -> nn.Module:
    index, state = read_checkpoint(folder, _read_tensors)
    built = build_model()
    if not isinstance(built, nn.Module):
        raise TypeError(f"load: build_model must return a nn.Module, got {built!r:.60}")
    model = network = network_of(built, "load")
    if history(model):
        raise ValueError(
            f"load: build_model must return the float network, got one that is {history(model)[-1]['stage']}"
        )
    with without_wrappers(network), _restored_on_error(network):
        for entry in plain_names(index["history"]):
            model = _restored(model, entry, folder)
            remember(model, entry)
        _fill(model, {plain_names(key): tensor for key, tensor in state.items()}, folder)
    if any(wrapped_at(module) for module in model.modules()):
        model.__dict__[HISTORY] = names_inside(history(model), model)
    return built if model is network else model


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Gives a model its modules, and its tensors their memory, back on an error: it may be a model in use."""
    memory = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    with all_or_nothing(model):
        try:
            yield
        except BaseException:
            for tensor, data in memory:
                tensor.data = data
            raise


def read_checkpoint(directory: str | os.PathLike[str], read: Callable[[Path, Facts], T]) -> tuple[Facts, T]:
    """Returns the JSON of a checkpoint, checked, and what `read(folder, json)` makes of its tensor file.

    A save may replace both at any time: an error counts only if the JSON is still the one that was read.

    Raises:
        ValueError: as `load`.
    """
    folder = Path(directory)
    for _ in range(ATTEMPTS):
        before = _stamp(folder)
        try:
            index = read_index(folder)
            return index, read(folder, index)
        except ValueError:
            if _stamp(folder) == before:
                raise
    raise ValueError(f"load: {folder} must hold one checkpoint for as long as it is read, got {ATTEMPTS} new ones")


def _stamp(folder: Path) -> tuple[int, ...]:
    """Returns what tells one JSON from the next; () if there is none."""
    try:
        facts = (folder / INDEX).stat()
    except OSError:
        return ()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the JSON of a checkpoint, checked, its history migrated to this version; `version` is that of the file.

    Raises:
        ValueError: as `load`.
    """
    path = Path(directory) / INDEX
    if not path.is_file():
        raise ValueError(
            f"load: the folder must hold a {INDEX}, got {directory}; give a folder written by gs_algos.save"
        )
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} must be JSON, got {error}; the checkpoint is damaged") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be of format {FORMAT!r}, got a foreign file")
    version = index.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"load: the version of {path} must be 1 to {VERSION}, got {version!r}; update golden-stick")
    unknown = sorted(index.keys() - FIELDS)
    if unknown:
        raise ValueError(
            f"load: {path} must have no fields but {', '.join(sorted(FIELDS))}, got {unknown[0]!r}; update golden-stick"
        )
    for what, right in _requirements(index):
        if not right:
            raise ValueError(f"load: {path} must have {what}; the checkpoint is damaged")
    for entry in index["history"]:
        try:
            restorer(entry["algorithm"])
        except UnknownAlgorithmError as error:
            way = "update golden-stick, or install or import what has it"
            raise ValueError(f"load: {path} names an unknown {error}; {way}") from error
        except ValueError as error:
            raise ValueError(f"load: {path} cannot be read, {error}") from error
    return {**index, "history": [_migrated(entry, version, path) for entry in index["history"]]}


def _without_empty_settings(entry: dict[str, Any]) -> dict[str, Any]:
    """Turns `{}`, which version 1 wrote for a row without settings, into None."""
    return with_settings(entry, lambda row: row["settings"] or None)


MIGRATIONS = {1: _without_empty_settings}  # of what is the same in all algorithms; theirs follow


def _migrated(entry: dict[str, Any], version: int, path: Path) -> dict[str, Any]:
    """Puts a history entry of a file into the words of this version, and checks its plan.

    Raises:
        ValueError: if the plan is damaged.
    """
    algorithm = restorer(entry["algorithm"])
    try:
        for earlier in range(version, VERSION):
            for migrations in (MIGRATIONS, algorithm.migrations):
                entry = migrations[earlier](entry) if earlier in migrations else entry
        plan = [row.to_dict() for row in rows_of(entry["plan"], algorithm.row_settings)]
    except LOAD_ERRORS as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"load: {path} must have a plan that {entry['algorithm']} of version {version} can have written: {what}; "
            "the checkpoint is damaged"
        ) from error
    return {**entry, "plan": plan}


def _requirements(index: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yields what must hold of the JSON, in words, and whether it does; later items rely on earlier ones."""
    facts: Any = index.get("tensors")
    aliases, entries = index.get("aliases"), index.get("history")
    yield "tensors, with file, sha256 and nbytes", isinstance(facts, dict)
    file, digest, nbytes = (facts.get(key) for key in ("file", "sha256", "nbytes"))
    yield (
        f"a tensor file beside it, model-<16 hexadecimal digits>.safetensors, got {file!r}",
        isinstance(file, str) and TENSOR_FILE.fullmatch(file) is not None,
    )
    yield "the SHA-256 and size of the tensor file", isinstance(digest, str) and type(nbytes) is int
    yield (
        "aliases, a name for a name",
        isinstance(aliases, dict) and all(isinstance(source, str) for source in aliases.values()),
    )
    yield "a history of at least one entry", isinstance(entries, list) and bool(entries)
    for entry in entries or []:
        yield "a history of objects", isinstance(entry, dict)
        yield "an algorithm in every history entry", isinstance(entry.get("algorithm"), str)
        yield f"a stage in every history entry, {' or '.join(STAGES)}", entry.get("stage") in STAGES
        steps = entry.get("steps")
        yield "the steps of every history entry, a number >= 0", type(steps) is int and 0 <= steps < MOST_STEPS
        yield "the config of every history entry", isinstance(entry.get("config"), dict)
        rows = entry.get("plan")
        yield "the plan of every history entry", isinstance(rows, list) and all(map(PlanRow.fits, rows))


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state dict with every storage once, and for each other name the one it shares with."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, tensor in ((plain_names(name), tensor) for name, tensor in model.state_dict().items()):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            raise ValueError(
                f"save: {key} must be a plain tensor with data, got {type(tensor).__name__}; unshard it first"
            )
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[key] = seen[place]
            continue
        seen[place] = key
        tensors[key] = tensor.detach().cpu().contiguous()
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for key, tensor in tensors.items():
        if storages[tensor.untyped_storage().data_ptr()] > 1:  # overlapping views: safetensors wants each on its own
            tensors[key] = tensor.clone()
    return tensors, aliases


def _read_tensors(folder: Path, index: dict[str, Any]) -> dict[str, Tensor]:
    facts = index["tensors"]
    path = folder / facts["file"]
    try:
        nbytes = path.stat().st_size
        if nbytes != facts["nbytes"]:
            raise ValueError(f"load: {path} must have {facts['nbytes']} bytes, got {nbytes}; it is truncated")
        digest = sha256(path)
        if digest != facts["sha256"]:
            raise ValueError(f"load: {path} must have SHA-256 {facts['sha256']}, got {digest}; the file is damaged")
        state = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"load: {folder} must hold {path.name}, which is missing; the checkpoint is incomplete"
        ) from error
    except (OSError, RuntimeError) as error:  # torch maps the file, and gives the system's error as RuntimeError
        raise ValueError(f"load: {path} must be a readable file, got {error}") from error
    except SafetensorError as error:
        raise ValueError(f"load: {path} must be a safetensors file, got {error}") from error
    lost = sorted(source for source in index["aliases"].values() if source not in state)
    if lost:
        raise ValueError(f"load: {path} must hold {_some(lost)}, which aliases name; the checkpoint is damaged")
    return {**state, **{key: state[source] for key, source in index["aliases"].items()}}


def _restored(model: nn.Module, entry: dict[str, Any], folder: Path) -> nn.Module:
    try:
        return restorer(entry["algorithm"]).restore(model, entry)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"load: build_model must make the network that {folder} was saved from, got {type(error).__name__}: {error}"
        ) from error


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    lacking, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if lacking or foreign:
        raise ValueError(
            f"load: build_model must make the network that {folder} was saved from; it has {_some(lacking)} "
            f"that the checkpoint lacks, and lacks {_some(foreign)}"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape or tensor.dtype != state[key].dtype:
            raise ValueError(
                f"load: {key} must be {tuple(tensor.shape)} {tensor.dtype}, got {tuple(state[key].shape)} "
                f"{state[key].dtype} in {folder}; build_model must make the same network"
            )
    refuse_values(model, state, f"load: {folder}")
    try:
        with torch.no_grad():
            model.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise ValueError(f"load: {folder} must fit the network that build_model makes, got: {error}") from error


def _some(keys: list[str]) -> str:
    return (", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")) if keys else "nothing"
