"""Chains of tensor operations compiled once for CPU, for any size.

`torch.compile` compiles again for every size that is 0, 1 or was equal to another in its first call. So a chain is
compiled per variant (rank, dtype, flags), ahead of its first use, on an example whose sizes are large and all differ.
Without a C++ compiler the chain runs eagerly, which is said once.
"""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Chain = Callable[..., Any]

_ready: dict[tuple[Chain, Hashable], Chain] = {}
_lock = threading.RLock()
_usable = True


def compiled(
    chain: Chain,
    variant: Hashable,
    example: Callable[[], tuple[Any, ...]],
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None,
) -> Chain:
    """`chain`, compiled when first asked for; or as it is if it cannot be compiled here.

    Args:
        chain: a function without closure, of tensors and constants.
        variant: what tells apart calls that need code of their own; tensor sizes of one variant are all above 1.
        example: makes the arguments of one such call.
        options: of the compiler, as `torch.compile` takes them; the same in every call for one chain.
    """
    key = (chain, variant)
    if key not in _ready:
        with _lock:
            if key not in _ready:
                _ready[key] = _compile(chain, variant, example, options)
    return _ready[key]


def _compile(
    chain: Chain,
    variant: Hashable,
    example: Callable[[], tuple[Any, ...]],
    options: dict[str, str | int | bool | Callable[..., Any]] | None,
) -> Chain:
    global _usable
    if not _usable:
        return chain
    # the compiler limits how often one code object is compiled: each variant is a code object of its own
    code = chain.__code__.replace(co_name=f"{chain.__name__}_{len(_ready)}")
    own = types.FunctionType(code, chain.__globals__, chain.__name__, chain.__defaults__)
    candidate = torch.compile(own, dynamic=True, options=options)
    logger.info("compiling %s %s for the CPU, once", chain.__name__, variant)
    try:
        call(candidate, *example())
    except (RuntimeError, OSError, ImportError) as error:
        _usable = False
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            "CPU chains run uncompiled, several times slower: torch.compile failed (%s); install a C++ compiler", reason
        )
        return chain
    return candidate


def call(chain: Chain, *args: Any) -> Any:
    """Runs a chain without gradients and autocast: settings of the caller would have it compiled again."""
    tensors = (a.detach() if isinstance(a, Tensor) else a for a in args)
    if torch.is_autocast_enabled("cpu"):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return chain(*tensors)
    with torch.no_grad():
        return chain(*tensors)
