"""How an op becomes a `torch.library` op that eager mode, autograd, `torch.compile` and `torch.export` all understand.

`torch.library.triton_op` does the same and imports triton at registration, which importing gs_kernels must not.
An op has one body. Eager mode runs it; AOTAutograd traces through it, so that a compiler sees a Triton launch on a
GPU and elsewhere plain ATen, which it can fuse. `torch.export` keeps one node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from gs_kernels.dispatch import Impl, choose, is_eager

NAMESPACE = "gs_kernels"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

IMPLEMENTATIONS: dict[str, Sequence[Impl]] = {}  # of each op, as registered


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# every op takes this as its last argument: compiler caches know an op by name and arguments, not by what its body does
SOURCE = _hash_sources()


def register(schema: str, impls: Sequence[Impl], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `gs_kernels::<schema>`, whose last argument is `str source`; fake: what the results look like.

    Returns:
        what a public function calls: the op, or its body at once where that is the same, which saves 30 us a call.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    IMPLEMENTATIONS[name] = impls

    def body(*args: Any) -> Any:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args[:-1])
        return choose(name, impls, *args).run(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)

    def decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return body(*args)

    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decompose, lib=_library)
    op = getattr(torch.ops.gs_kernels, name).default

    def run(*args: Any) -> Any:
        return body(*args) if _is_plain(args) else op(*args)

    return run


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody but the body has to see a call: no gradient, tracing, transform or subclass of tensors."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and is_eager(*tensors)
