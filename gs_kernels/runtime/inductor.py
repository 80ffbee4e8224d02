"""Compiles small functions of tensors for the CPU by inductor, which fuses their operations into one pass over memory.

`torch.compile` compiles again for every size that is 0, 1 or was equal to another in its first call, and takes 30 us or
more to find the code of a call. So a function is traced and compiled here per variant (rank, dtype, flags), before its
first use, on an example whose sizes are large and all differ; the code itself checks sizes and strides.
Where compiling fails, for want of a C++ compiler or of a folder, the function runs eagerly, which is logged once.

The cache of `torch.compile` on disk does not record for which width of vectors a loop was made: a CPU with narrower
vectors would read the wrong elements, one with wider vectors would write past the ends of tensors. `compiled` makes the
width part of the options, and thereby of the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import subprocess
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.instructions import described
from gs_kernels.runtime.torch_private import inductor_cache_dir, standalone_compiler, vector_bits

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

# of a compiler that is missing, fails or is stopped; of folders; of parts of PyTorch that were half imported then
FAILURES = (
    *(RuntimeError, OSError, ImportError, AttributeError, AssertionError, KeyError),
    *(ValueError, subprocess.SubprocessError),
)

_ready: dict[tuple[Function, Hashable, int], Function] = {}
_lock = threading.RLock()
_usable = True
_logged: set[str] = set()


def compiled(
    function: Function,
    variant: Hashable,
    example: Callable[[], tuple[Any, ...]],
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None,
) -> Function:
    """Compiles a function once for each variant and returns the code; the function itself if it cannot be compiled.

    Args:
        function: of tensors and constants; returns a tensor, a tuple of tensors or None.
        variant: a key that differs between calls that need different code; all constants are part of it. Every tensor
            size of such a call is above 1.
        example: makes the arguments of one such call.
        options: of the compiler, as `torch.compile` takes them; the same in every call for one function.
    """
    key = (function, variant, torch.get_num_threads())  # the code starts as many threads
    if key not in _ready:
        with _lock:
            if key not in _ready:
                _ready[key] = _compile(function, variant, example, options or {})
    return _ready[key]


def _compile(
    function: Function, variant: Hashable, example: Callable[[], tuple[Any, ...]], options: dict[str, Any]
) -> Function:
    global _usable
    if not _usable:
        return function
    logger.info("compiling %s %s for the CPU, once", function.__name__, variant)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            mark = _mark_of(function, variant)
            if not mark.exists():
                _log_compiling(function.__name__, mark.parent.parent)
            run = _compile_for(function, example(), options)
            _leave(mark)
            return run
    except FAILURES as error:
        _log_uncompiled(error)
        _usable = False
        return function


def _mark_of(function: Function, variant: Hashable) -> Path:
    """Returns the path of a file that exists once the code of this function is on disk."""
    key = (function.__module__, function.__name__, variant, described(), torch.__version__, torch.get_num_threads())
    return Path(inductor_cache_dir()) / "golden_stick" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.fused"


def _leave(mark: Path) -> None:
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _compile_for(function: Function, args: tuple[Any, ...], options: dict[str, Any]) -> Function:
    from torch.fx.experimental.proxy_tensor import make_fx

    standalone_compile, TracingContext, tracing = standalone_compiler()
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    kind: type = tuple

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal kind
        whole = list(args)
        for i, t in zip(places, tensors, strict=True):
            whole[i] = t
        result = function(*whole)
        kind = type(result)
        return result if kind is tuple else () if result is None else (result,)

    graph = make_fx(of_tensors, tracing_mode="symbolic")(*(args[i] for i in places))
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # the cache of PyTorch keeps loops for one width of vectors and compiles them for any: 8 at a time stored as 16
    options = {"cpp.simdlen": vector_bits(), **options}
    # sizes are symbols of the trace, which a function that returns nothing does not show in its results
    with tracing(TracingContext(inputs[0].fake_mode)):
        code = standalone_compile(
            graph, inputs, dynamic_shapes="from_tracing_context", options={"config_patches": options}
        )

    def run(*args: Any) -> Any:
        results = code(*[args[i] for i in places])
        return tuple(results) if kind is tuple else results[0] if results else None

    return run


def _log_uncompiled(error: BaseException) -> None:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    text = "CPU functions run unfused, several times slower: compiling failed (%s); install a C++ compiler"
    logger.warning(text, reason)


def _log_compiling(what: str, folder: Path) -> None:
    """Warns, once in a process, that a call takes seconds because it compiles, and the next one will not."""
    if "compiling" not in _logged:
        _logged.add("compiling")
        logger.warning("compiling for this CPU, once: %s; kept in %s", what, folder)


def call(function: Function, *args: Any) -> Any:
    """Calls a function without gradients and autocast."""
    if torch.is_autocast_enabled("cpu"):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args)
    with torch.no_grad():
        return function(*args)
