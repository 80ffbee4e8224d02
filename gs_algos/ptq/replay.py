"""Repeats what modules returned in an earlier pass of a block, where all that it comes from is rounded already.

Each stage is reached by running the block from its start. What was computed before the first layer that is still to be
rounded stays the same to the last bit, so it need not run again for the layers behind it: neither modules, nor the
products of attention, which are repeated as if they were a module inside the one that calls for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gs_algos.core.modules import swapped_class
from gs_algos.ptq.blocks import Block, submodule
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.streams import ActivationStore
from gs_kernels.runtime.torch_private import tree_leaves

ATTENTION = "scaled_dot_product_attention()"  # as the name of a child, which no module has


class _LastingOutput:
    """Holds what one call of a module returned."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self.tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.versions = [tensor._version for tensor in self.tensors]

    @property
    def changed(self) -> bool:
        """Says whether something was written into it since."""
        return any(tensor._version != version for tensor, version in zip(self.tensors, self.versions, strict=True))


class _Replayed(nn.Module):
    """Returns what is kept, call by call, while there is some. Mixed in front of the module's own class."""

    prefix: ClassVar[str] = "Replayed"
    kept_outputs: Iterator[_LastingOutput]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = next(self.kept_outputs, None)
        return super().forward(*args, **kwargs) if kept is None or kept.changed else kept.output  # type: ignore[misc]


class _ReplayedAttention(TorchFunctionMode):
    """Gives calls of `scaled_dot_product_attention` in the block to `attend`, which gets the call."""

    def __init__(self, attend: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attend(lambda: func(*args, **kwargs))


class Replay:
    """Keeps what the modules of one block returned, by batch, in up to half of the store's budget.

    Modules without a layer to be rounded run again, and so do those with forward hooks, which see each run; what
    `scaled_dot_product_attention` returned is kept too.

    Args:
        layers: that are to be rounded, those of the block among them; none to keep nothing.
    """

    def __init__(self, model: nn.Module, block: Block, layers: Collection[Rounded], store: ActivationStore) -> None:
        self.store, self.name = store, block.name
        inside = {id(module) for name in block.names for module in submodule(model, name).modules()}
        self.layers = [layer for layer in layers if id(layer) in inside]
        ours = set(map(id, self.layers))
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if name not in block.names
            and block.holds(name)
            and not module._forward_hooks
            and any(id(inner) in ours for inner in module.modules())
        }
        self._kept: dict[int, dict[str, list[_LastingOutput]]] = defaultdict(dict)

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Repeats what is kept of a batch while the block runs on it, and keeps what it shows more."""
        kept = self._kept[number]
        found: dict[str, list[_LastingOutput]] = {}
        within = [self.name]  # modules that run, the innermost last
        attended = {name: iter(outputs) for name, outputs in kept.items() if name.endswith(ATTENTION)}
        clean = True

        def unclean(*_: object) -> None:
            nonlocal clean
            clean = False

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: within.append(name)

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                within.pop()
                if clean:
                    found.setdefault(name, []).append(_LastingOutput(output))

            return hook

        def attend(call: Callable[[], Any]) -> Any:
            name = f"{within[-1]}.{ATTENTION}"
            one = next(attended.get(name, iter(())), None)
            if one is not None and not one.changed:
                return one.output
            output = call()
            if clean and name not in kept:
                found.setdefault(name, []).append(_LastingOutput(output))
            return output

        with ExitStack() as stack:
            for layer in self.layers:
                if not layer.solved:
                    stack.callback(layer.register_forward_pre_hook(unclean).remove)
            for name, module in self.modules.items():
                if name in kept:
                    stack.enter_context(_replayed(module, kept[name]))
                elif not _inside(name, kept):
                    stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                    stack.callback(module.register_forward_hook(keep(name)).remove)
            if self.modules:
                stack.enter_context(_ReplayedAttention(attend))
            yield
        for name, outputs in found.items():
            if not _inside(name, found) and not any(one.changed for one in outputs):
                self._keep(kept, name, outputs)

    def _keep(self, kept: dict[str, list[_LastingOutput]], name: str, outputs: list[_LastingOutput]) -> None:
        """Keeps the outputs of a module in the place of those of modules inside it, if there is room."""
        for inner in [other for other in kept if _inside(other, [name])]:
            self._drop(kept.pop(inner))
        tensors = [tensor for one in outputs for tensor in one.tensors]
        if self.store.held + sum(tensor.nbytes for tensor in tensors) <= self.store.budget // 2:
            for tensor in tensors:
                self.store.keep(tensor)
            kept[name] = outputs

    def forget(self, number: int) -> None:
        """Drops what is kept of a batch."""
        for outputs in self._kept.pop(number, {}).values():
            self._drop(outputs)

    def clear(self) -> None:
        """Drops what is kept of all batches, since a layer changes that was rounded."""
        for number in list(self._kept):
            self.forget(number)

    def _drop(self, outputs: list[_LastingOutput]) -> None:
        for one in outputs:
            for tensor in one.tensors:
                self.store.drop(tensor)


def _inside(name: str, others: Collection[str]) -> bool:
    """Says whether a module is inside one of others."""
    return any(name.startswith(f"{other}.") for other in others)


@contextmanager
def _replayed(module: nn.Module, outputs: list[_LastingOutput]) -> Iterator[None]:
    """Lets a live module return what is kept."""
    live: Any = module
    before = type(live)
    live.__class__ = swapped_class(_Replayed, before)
    live.kept_outputs = iter(outputs)
    try:
        yield
    finally:
        live.__class__ = before
        del live.kept_outputs
