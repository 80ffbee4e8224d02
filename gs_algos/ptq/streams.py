"""Holds what goes from block to block: activations of every batch, in memory up to a budget, then in mapped files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, InputsError, describe_error, evaluating, run
from gs_algos.core.files import scratch_folder
from gs_algos.core.mapped_files import in_file
from gs_algos.ptq.blocks import Block, first_tensor, submodule
from gs_algos.ptq.journal import ACTIVATIONS
from gs_kernels.runtime.torch_private import tree_flatten, tree_leaves, tree_unflatten

PLAIN = bool, int, float, str
CACHES = ("past_key_values", "past_key_value", "cache_params", "cache_position")


class ActivationStore:
    """Keeps tensors in memory until `budget` bytes are taken, the others in files that are mapped into memory.

    The files are in a folder that is gone when the store is closed.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.held, self.peak, self.on_disk = budget, 0, 0, 0
        self._parent, self._count = folder, 0
        self._folder: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the same values that is counted: this one, or one in a file. Give it to `drop` later."""
        tensor = tensor.detach()
        if self.held + tensor.nbytes <= self.budget or not tensor.numel():
            self.held += tensor.nbytes
            self.peak = max(self.peak, self.held)
            return tensor
        if self._folder is None:
            if self._parent is None:
                self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                self._folder = self._stack.enter_context(scratch_folder(self._parent / ACTIVATIONS))
        self._count += 1
        mapped = in_file(tensor, self._folder / f"{self._count}.bin")
        self.on_disk += tensor.nbytes
        return mapped

    def drop(self, tensor: Tensor) -> None:
        """Says that a tensor of `keep` is no longer held."""
        if tensor.untyped_storage().filename is None:
            self.held -= tensor.nbytes


class _Stop(Exception):
    """Ends a forward pass once it has shown what was wanted."""


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Ends the block quietly where a hook inside raised the signal to stop."""
    with contextlib.suppress(_Stop):
        yield


def stop() -> None:
    """Ends the forward pass that a hook is called in; the caller runs it in `stopped`."""
    raise _Stop


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Runs the block with the caches of language models off, as their configs say it."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in found if hasattr(config, "use_cache")}.values())
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


class Arguments:
    """Holds what a module gets beside the tensor that goes from block to block."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        kwargs = {key: value for key, value in kwargs.items() if key not in CACHES}
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.at = next(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor))
        self.leaves[self.at] = None

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """Calls a module with x in the place of its first tensor, and returns the first tensor of its result."""
        leaves = list(self.leaves)
        leaves[self.at] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        y = first_tensor(module(*args, **kwargs))
        assert y is not None
        return y

    def same_as(self, other: Arguments) -> bool:
        """Says whether another module gets the very same: the same tensors, and equal numbers and texts."""
        if self.spec != other.spec or self.at != other.at:
            return False
        pairs = zip(self.leaves, other.leaves, strict=True)
        return all(a is b or (isinstance(a, PLAIN) and type(a) is type(b) and a == b) for a, b in pairs)


class Streams:
    """Holds the float and the quantized activations of every batch at one point of the network, and moves them on.

    Args:
        batches: the inputs of the network.
        blocks: in the order they run in.
        floats: whether there is a float stream beside the quantized one.
        float_network: gives a context in which the network is float.
        round_first: rounds what stands in front of the first block, and says whether there was anything.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Inputs],
        blocks: Sequence[Block],
        store: ActivationStore,
        floats: bool,
        who: str,
        float_network: Callable[[], AbstractContextManager[None]] = nullcontext,
        round_first: Callable[[], bool] = bool,
    ) -> None:
        self.model, self.batches, self.blocks, self.store, self.who = model, batches, blocks, store, who
        self.whole = blocks[0].names == ("",)
        self.arguments: list[dict[str, Arguments]] = []  # of each batch: name of a module -> its arguments
        self.quantized: list[Tensor] = []
        self.floats: list[Tensor] | None = [] if floats else None
        if self.whole:
            return
        names = [name for block in blocks for name in block.names]
        first: list[Tensor] = []
        same: dict[str, str] = {}  # module -> the first that gets the same beside its first tensor
        until = names[-1]
        with float_network():
            for batch in batches:
                x, seen = self._first(batch, names, until)
                same = same or {name: next(n for n in names if seen[name].same_as(seen[n])) for name in names}
                until = max(same.values(), key=names.index)  # those behind it get nothing new
                self.arguments.append({name: seen[same[name]] for name in names})
                first.append(x)
        self.quantized = [store.keep(x) for x in first]
        if self.floats is not None:
            self.floats = list(self.quantized)  # the same tensors, which are counted once
        if round_first():
            for number, batch in enumerate(batches):
                self.advance(number, self._first(batch, names, names[0])[0], floats=False)

    def _first(self, batch: Inputs, names: Sequence[str], until: str) -> tuple[Tensor, dict[str, Arguments]]:
        """Returns what goes into the first module, and what goes beside it into each of `names` up to `until`."""
        seen: dict[str, Arguments] = {}
        first: list[Tensor] = []

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if not first:
                    first.append(next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))
                seen[name] = Arguments(args, kwargs)
                if name == until:
                    stop()

            return hook

        wanted = names[: names.index(until) + 1]
        with ExitStack() as stack, evaluating(self.model), without_cache(self.model):
            for name in wanted:
                module = submodule(self.model, name)
                # in front of other hooks, which are called again when a block is run
                handle = module.register_forward_pre_hook(before(name), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            with stopped():
                run(self.model, batch, self.who)
        if len(seen) < len(wanted):
            lost = next(name for name in wanted if name not in seen)
            raise ValueError(f"{self.who}: every batch must run through all blocks, got one that skips {lost}")
        return first[0], seen

    def run_block(self, block: Block, number: int, stream: Sequence[Tensor] | None) -> Tensor | None:
        """Runs a block on one batch of a stream; None if a hook stopped it. stream: None for the whole network."""
        return self.output_of(block, number, None if self.whole or stream is None else stream[number])

    def output_of(self, block: Block, number: int, x: Tensor | None, gradients: bool = False) -> Tensor | None:
        """Runs a block on x, None for the whole network, with what a batch has beside it; None if a hook stopped it."""
        modules = [submodule(self.model, name) for name in block.names]  # all that there is to run: a network is large
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(evaluating(module))
                stack.enter_context(without_cache(module))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(stopped())
            if self.whole:
                return first_tensor(run(self.model, self.batches[number], self.who))
            assert x is not None
            for name, module in zip(block.names, modules, strict=True):
                try:
                    x = self.arguments[number][name].call(module, x)
                except (RuntimeError, TypeError) as error:
                    got = f"in {name}, with batch {number}, {describe_error(error)}"
                    raise InputsError(self.who, f"every batch must run through the model, got {got}") from error
            return x
        return None

    def advance(self, number: int, new: Tensor, floats: bool) -> None:
        """Puts the output of a block in the place of its input in one stream."""
        stream = self.floats if floats else self.quantized
        other = self.quantized if floats else self.floats
        assert stream is not None
        old = stream[number]
        stream[number] = self.store.keep(new)
        if other is None or other[number] is not old:
            self.store.drop(old)
