"""Finds modules and parameters by qualified name and replaces them, hooks included, at every name that they have."""

from __future__ import annotations

import copyreg
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import nn

# hooks by their handles' numbers, and which of them are called with what
HOOKS = tuple(key for key, value in nn.Module().__dict__.items() if "_hooks" in key and isinstance(value, dict))

# a tracer patches `nn.Module` for all threads: who traces a model, or runs one on the way, holds this
TRACING = threading.RLock()


def canonical_names(model: nn.Module) -> dict[int, str]:
    """Returns `id(module) -> first qualified name`, which `model.named_modules()` gives a module registered twice."""
    return {id(module): name for name, module in model.named_modules()}


def names_of(model: nn.Module, module: nn.Module) -> tuple[str, ...]:
    """Returns every qualified name under which this very object is registered, in registration order."""
    return tuple(name for name, found in model.named_modules(remove_duplicate=False) if found is module)


def get_module(model: nn.Module, name: str) -> nn.Module:
    """Returns the module registered at a qualified name; "" is the model itself.

    Raises:
        ValueError: if no module has this name.
    """
    module = model
    for i, part in enumerate(name.split(".") if name else []):
        child = module._modules.get(part)
        if child is None:
            parent = ".".join(name.split(".")[:i]) or "the root"
            has = ", ".join(module._modules) or "no children"
            raise ValueError(f"get_module: name must be a module of the model, got {name!r}; {parent} has {has}")
        module = child
    return module


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` at a qualified name, and at every other name of the module it replaces, so that sharing survives.

    `new` takes over the training flag and the hooks of the module it replaces. Hooks are moved: a handle still removes
    its hook, and putting the old module back gives it its hooks back. A module of the model that `new` wraps keeps its
    own flag and hooks.

    Raises:
        ValueError: if no module has this name, or it is the model itself.
    """
    old = get_module(model, name)
    if old is model:
        raise ValueError(
            f"set_module: name must be inside the model, got {name!r}; the root cannot be replaced in place"
        )
    before = {id(module) for module in model.modules()}
    inside = list(new.modules())
    if not any(module is old for module in inside):
        _move_hooks(old, new)
    for module in inside:
        if id(module) not in before:  # a module wrapped by `new` keeps its own flag
            module.training = old.training
    slots = [
        (parent, key)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is old and parent is not new
    ]
    for parent, key in slots:
        parent._modules[key] = new


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves hooks from `old` to `new` by handing over the dictionaries that hold them: handles refer to these."""
    for key in HOOKS:
        held, own = old.__dict__[key], new.__dict__[key]
        if held is not own:
            held.update(own)
            old.__dict__[key], new.__dict__[key] = type(held)(), held
        for hook in held.values():
            if getattr(hook, "with_module", False):  # torch's own wrapper of a hook, which knows its module
                hook.module = weakref.ref(new)
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook, old._is_full_backward_hook = old._is_full_backward_hook, None


def remove_hooks(model: nn.Module, matches: Callable[[Any], bool]) -> None:
    """Takes the hooks that match off every module of a model, also off a copy, whose hooks no handle refers to."""
    for module in model.modules():
        tables = [module.__dict__[key] for key in HOOKS]
        for number in {number for table in tables for number, hook in table.items() if matches(hook)}:
            for table in tables:
                table.pop(number, None)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restores class, attributes and registered members of every module if the block raises."""
    before = [
        (
            module,
            type(module),
            dict(module.__dict__),
            {k: dict(v) for k, v in module.__dict__.items() if isinstance(v, dict)},
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, registered in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, items in registered.items():
                attributes[key].clear()
                attributes[key].update(items)
        raise


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields modules without children, each object once, under its canonical name, in registration order."""
    for name, module in model.named_modules():
        if not module._modules:
            yield name, module


def parameter_owners(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Returns `id(parameter) -> its qualified names`, one name per owning module: more than one means tied weights.

    A module registered twice owns its parameters once. A parametrized weight is listed as its `original`. A parameter
    that one layer borrows from one owner (gs_algos/fx/modularize/shared_parameters.py) counts as the borrower's alone.
    """
    owners: dict[int, tuple[str, ...]] = {}
    borrowers: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        borrowed = getattr(module, "borrowed", ())
        for key, parameter in module._parameters.items():
            if parameter is not None:
                qualified = f"{name}.{key}" if name else key
                owners[id(parameter)] = (*owners.get(id(parameter), ()), qualified)
                if key in borrowed:
                    borrowers.setdefault(id(parameter), []).append(qualified)
    for lent, names in borrowers.items():
        if len(names) == 1 and len(owners[lent]) == 2:
            owners[lent] = (names[0],)
    return owners


def computed_by(layer: nn.Module, key: str = "weight") -> str:
    """Says what computes a weight that is no parameter of its layer (`WeightNorm`, a parametrization), or ""."""
    if layer._parameters.get(key) is not None:
        return ""
    parametrizations = getattr(layer, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and key in parametrizations:
        made = list(parametrizations[key])  # type: ignore[call-overload]
    else:
        made = [hook for hook in layer._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.")]
    held = "a buffer" if key in layer._buffers else "code outside the layer"
    return " and ".join(type(one).__name__.lstrip("_") for one in made) or held


def own_forward(layer: nn.Module, base: type[nn.Module]) -> str:
    """Says why a layer derived from `base` may compute something else than `base` does; "" if it cannot."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    for name in ("forward", "_conv_forward", "__call__"):
        if getattr(type(layer), name, None) is not getattr(base, name, None):
            return f"{type(layer).__name__} has a {name} of its own"
    return ""


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Returns the module at a qualified name, or the one that holds the parameter of that name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return modules[name] if name in modules else modules[parent_name(name)]


def parent_name(name: str) -> str:
    """Returns the qualified name of the module that holds a module or parameter; "" for the root."""
    return name.rpartition(".")[0]


def swapped_class(mixin: type[nn.Module], base: type[nn.Module]) -> Any:
    """Returns the class of a live layer of class `base` with `mixin` in front, the same one each time."""
    return _swapped_class(cast(Hashable, mixin), cast(Hashable, base))


@cache
def _swapped_class(mixin: Any, base: Any) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """Pickles as (mixin, base): a spawned process, and a copy, make the class anew."""
        make, parts, *state = super(made, self).__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _empty, (mixin, base), *state
        return (make, (mixin, *parts), *state) if make is _empty else (make, parts, *state)

    members = {"__module__": __name__, "__reduce_ex__": reduce}
    made: Any = type(f"{mixin.prefix}{base.__name__}", (mixin, base), members)
    return made


def _empty(*parts: Any) -> Any:
    """Makes an object without state of the class made of these mixins, the first in front, and a base."""
    *mixins, made = parts
    for mixin in reversed(mixins):
        made = _swapped_class(mixin, made)
    return made.__new__(made)
