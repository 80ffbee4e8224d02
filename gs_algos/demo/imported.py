"""Imports `package.module:function`: a user's network or data, named on the command line or in a recipe."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from gs_algos.core.algorithm import describe_error


class NotImportableError(ValueError):
    """Says that a name stands for no function."""


def is_imported(name: str) -> bool:
    """Says whether a name means a function that is to be imported."""
    return ":" in name


def import_function(name: str) -> Callable[..., Any]:
    """Imports the function of `package.module:function`; modules in the current folder are found too.

    Raises:
        ValueError: if there is none.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        hint = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise NotImportableError(
            f"{name} must name an importable function, got a file; write {hint}:{attribute or 'function'}"
        )
    sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module_name) if module_name else None
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise NotImportableError(f"{name} must name an importable function, got: {error}") from error
    except Exception as error:  # what a module does when it is imported may raise anything
        raise NotImportableError(f"{name} must name an importable function, got {describe_error(error)}") from error
    except SystemExit as stop:  # a script: it would end the command as if all had been done
        raise NotImportableError(
            f"{name} must name an importable function, got a module that ends the process; "
            "put what it runs under if __name__ == '__main__'"
        ) from stop
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise NotImportableError(f"{name} must name an importable function, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def call(name: str, **known: Any) -> Any:
    """Calls the function with those of the known values that it has parameters for, and returns its result.

    Raises:
        ValueError: if it needs others too.
    """
    function = import_function(name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # of a builtin: it has no signature
        return function()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    given = {key: value for key, value in known.items() if takes_all or key in {p.name for p in parameters}}
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in fixed and p.name not in given]
    if needed:
        takes = f"at most {', '.join(known)}" if known else "no arguments"
        raise ValueError(f"{name} must be a function that needs {takes}, got one that needs {', '.join(needed)}")
    try:
        return function(**given)
    except SystemExit as stop:
        raise ValueError(f"{name}() must return, got one that ends the process") from stop
    except Exception as error:  # the caller's own code may raise anything
        raise ValueError(f"{name}() must return, got {describe_error(error)}; --debug shows where") from error


def import_network(name: str, **sizes: int) -> nn.Module:
    """Builds a network by `package.module:function`, which is given those of the sizes that it has parameters for.

    Raises:
        ValueError: if there is no such function, it needs more, or it returns something else.
    """
    net = call(name, **sizes)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name}() must return a torch.nn.Module, got {type(net).__name__}")
    return net
