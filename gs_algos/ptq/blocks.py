"""Finds the blocks of a network by the tensors that go from one module to the next, not by the names of modules.

A chain is a list of modules of which each gets, as its first tensor, the very tensor that the one before returned: the
layers of a language model, the blocks of a ResNet. Modules with fewer than two layers to round (a stem, a norm, a
pooling) belong to the block behind them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_kernels.runtime.torch_private import tree_leaves

FEWEST = 3  # blocks that make a chain
BIG = 2  # layers to round that make a module a block of its own


@dataclass(frozen=True)
class Block:
    """Describes one block: modules that run one after the other, by name. One named "" is the whole network."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[-1]

    def holds(self, site: str) -> bool:
        return any(not name or site == name or site.startswith(f"{name}.") for name in self.names)


@dataclass
class Call:
    """Holds the one call of a module: its number, and the tensors it got and gave."""

    name: str
    begun: int
    first: Tensor | None
    others: list[Tensor]
    ended: int = 0
    given: Tensor | None = None
    count: int = 1


def find_blocks(
    model: nn.Module, sites: Collection[str], inputs: Inputs, blocks: str = "auto", who: str = "PTQ"
) -> list[Block]:
    """Returns the blocks of a network in the order they run in; one, the whole network, if there are fewer than three.

    Args:
        sites: names of the layers that are to be rounded.
        inputs: of one call.
        blocks: "auto"; "none" for the whole network as one; or `re:<expression>` that the names of blocks match whole.

    Raises:
        ValueError: if the expression matches no module, or modules that are not a chain; or the inputs do not run.
    """
    whole = [Block(("",))]
    if blocks == "none":
        return whole
    calls = _record(model, inputs, who)
    weight = {name: sum(site == name or site.startswith(f"{name}.") for site in sites) for name in calls}
    if blocks != "auto":
        return _named(model, calls, weight, blocks.removeprefix("re:"), who)
    usable = {name: call for name, call in calls.items() if name and call.count == 1}
    for fewest in (BIG, 1):
        found = _grouped(_chain(usable, weight, fewest), {name for name in usable if weight[name] >= fewest})
        if len(found) >= FEWEST:
            return found
    return whole


def _grouped(path: Sequence[str], ends: Collection[str]) -> list[Block]:
    """Joins modules that are no blocks to the block behind them; those behind the last block are left out."""
    groups: list[Block] = []
    waiting: list[str] = []
    for name in path:
        waiting.append(name)
        if name in ends:
            groups.append(Block(tuple(waiting)))
            waiting = []
    return groups


def _named(
    model: nn.Module, calls: Mapping[str, Call], weight: Mapping[str, int], pattern: str, who: str
) -> list[Block]:
    names = [name for name, _ in model.named_modules() if name and re.fullmatch(pattern, name)]
    if not names:
        raise ValueError(f"{who}: blocks must match the names of modules, got re:{pattern}, which matches none")
    for name in names:
        if name not in calls or calls[name].count > 1:
            what = "is not called" if name not in calls else "is called more than once"
            raise ValueError(f"{who}: blocks must be modules that are called once, got {name}, which {what}")
    names.sort(key=lambda name: calls[name].begun)
    for before, after in itertools.pairwise(names):
        if not _follows(calls[before], calls[after]):
            raise ValueError(
                f"{who}: each block must get the very tensor that the one before returned, got {after} behind {before}"
                "; name other modules, or use blocks='none'"
            )
    return _grouped(names, {name for name in names if weight[name] > 0})


def _record(model: nn.Module, inputs: Inputs, who: str) -> dict[str, Call]:
    """Runs the network once and returns the call of every module that was called."""
    with recorded(model.named_modules()) as calls, evaluating(model):
        run(model, inputs, who)
    return calls


@contextmanager
def recorded(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, Call]]:
    """Records the first call of each of the modules, by name, while the block runs."""
    calls: dict[str, Call] = {}
    clock = 0

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal clock
            clock += 1
            if name in calls:
                calls[name].count += 1
                return
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            calls[name] = Call(name, clock, tensors[0] if tensors else None, tensors[1:])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal clock
            clock += 1
            call = calls[name]
            call.ended, call.given = clock, first_tensor(output)

        return hook

    with ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        yield calls


def first_tensor(output: Any) -> Tensor | None:
    """Returns the first tensor of what a module returned: itself, or the first of a tuple or mapping."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor."""
    return tensor.untyped_storage().data_ptr()


def _follows(a: Call, b: Call) -> bool:
    """Returns whether b ran behind a, on the very tensor that a returned."""
    return a.given is not None and b.first is a.given and a.ended < b.begun


def _chain(calls: Mapping[str, Call], weight: Mapping[str, int], fewest: int) -> list[str]:
    """Returns the longest path of modules that see nothing of the path but the tensor they get first."""
    calls = dict(calls)
    while True:
        path = _longest(calls, lambda name: weight[name] >= fewest, weight)
        passed = {storage_of(t) for name in path for t in (calls[name].first, calls[name].given) if t is not None}
        odd = [n for n in path if any(o.is_floating_point() and storage_of(o) in passed for o in calls[n].others)]
        if not odd:
            return path
        for name in odd:
            del calls[name]


def _longest(calls: Mapping[str, Call], counts: Callable[[str], bool], weight: Mapping[str, int]) -> list[str]:
    """Returns the path of calls with the most modules that count; of several, the one with most layers, fewest modules.

    A module and one inside it are never both on a path: the inner one has ended before the outer one does, and begun
    after it.
    """
    order = sorted(calls.values(), key=lambda call: call.begun)
    takers: dict[int, list[Call]] = {}
    for call in order:
        if call.first is not None:
            takers.setdefault(id(call.first), []).append(call)
    best: dict[str, tuple[tuple[int, int, int], list[str]]] = {}
    for call in reversed(order):
        own = (int(counts(call.name)), weight[call.name], -1)
        tails = [best[b.name] for b in takers.get(id(call.given), []) if b.name in best and _follows(call, b)]
        tail = max(tails, key=lambda item: item[0], default=((0, 0, 0), []))
        score = (own[0] + tail[0][0], own[1] + tail[0][1], own[2] + tail[0][2])
        best[call.name] = (score, [call.name, *tail[1]])
    return max((item for item in best.values()), key=lambda item: item[0], default=((0, 0, 0), []))[1]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of a block; the network itself for ""."""
    return model if not name else model.get_submodule(name)
