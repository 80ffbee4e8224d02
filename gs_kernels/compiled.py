"""Chains of tensor operations, and files of C++, compiled once for the CPU.

`torch.compile` compiles again for every size that is 0, 1 or was equal to another in its first call, and takes 30 us or
more to find the code of a call. So a chain is traced and compiled per variant (rank, dtype, flags), ahead of its first
use, on an example whose sizes are large and all differ; the code itself checks sizes and strides.
Without a C++ compiler the chain runs eagerly, which is said once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Chain = Callable[..., Any]

_ready: dict[tuple[Chain, Hashable, int], Chain] = {}
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
        chain: of tensors and constants; returns a tensor, a tuple of tensors or None.
        variant: what tells apart calls that need code of their own, all constants among it; tensor sizes of one
            variant are all above 1.
        example: makes the arguments of one such call.
        options: of the compiler, as `torch.compile` takes them; the same in every call for one chain.
    """
    key = (chain, variant, torch.get_num_threads())  # the code starts as many threads
    if key not in _ready:
        with _lock:
            if key not in _ready:
                _ready[key] = _compile(chain, variant, example, options or {})
    return _ready[key]


def _compile(chain: Chain, variant: Hashable, example: Callable[[], tuple[Any, ...]], options: dict[str, Any]) -> Chain:
    global _usable
    if not _usable:
        return chain
    logger.info("compiling %s %s for the CPU, once", chain.__name__, variant)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _compile_for(chain, example(), options)
    except (RuntimeError, OSError, ImportError) as error:
        _say_uncompiled("CPU chains run uncompiled", error)
        _usable = False
        return chain


def _say_uncompiled(what: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    logger.warning("%s, several times slower: compiling failed (%s); install a C++ compiler", what, reason)


def native(source: Path, functions: Mapping[str, Sequence[Any]], is_right: Callable[[Any], bool]) -> Any:
    """The void functions of a C++ file, compiled and kept on disk; None, which is said, if that fails or one is wrong.

    They may use OpenMP, and any instructions that they name themselves by attributes.

    Args:
        functions: the types of their arguments.
        is_right: whether they compute what they should: a CPU that is emulated may lack instructions that it reports.
    """
    file = f"{source.parent.name}/{source.name}"
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(source.read_text())
        for name, argtypes in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, None
    except (RuntimeError, OSError, ImportError) as error:
        _say_uncompiled(f"{file} is replaced by tensor operations", error)
        return None
    if is_right(library):
        return library
    logger.warning("the compiled %s computes wrong results; the slower way is taken", file)
    return None


def _compile_for(chain: Chain, args: tuple[Any, ...], options: dict[str, Any]) -> Chain:
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile  # importing it takes a second
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.fx.experimental.proxy_tensor import make_fx

    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    kind: type = tuple

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal kind
        whole = list(args)
        for i, t in zip(places, tensors, strict=True):
            whole[i] = t
        result = chain(*whole)
        kind = type(result)
        return result if kind is tuple else () if result is None else (result,)

    graph = make_fx(of_tensors, tracing_mode="symbolic")(*(args[i] for i in places))
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # the cache of PyTorch keeps loops for one width of vectors and compiles them for any: 8 at a time stored as 16
    options = {"cpp.simdlen": pick_vec_isa().bit_width(), **options}
    # sizes are symbols of the trace, which a chain that returns nothing does not show in its results
    with tracing(TracingContext(inputs[0].fake_mode)):
        code = standalone_compile(
            graph, inputs, dynamic_shapes="from_tracing_context", options={"config_patches": options}
        )

    def run(*args: Any) -> Any:
        results = code(*[args[i] for i in places])
        return tuple(results) if kind is tuple else results[0] if results else None

    return run


def call(chain: Chain, *args: Any) -> Any:
    """Runs a chain without gradients and autocast."""
    if torch.is_autocast_enabled("cpu"):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return chain(*args)
    with torch.no_grad():
        return chain(*args)
