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
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

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


def register(
    schema: str,
    impls: Sequence[Impl],
    fake: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines `gs_kernels::<schema>`, whose last argument is `str source`.

    Args:
        fake: what the results look like.
        gradient, setup_context: as `torch.library.register_autograd` takes them.

    Returns:
        what functions call: the op or, where that is the same, its body at once, which saves 30 to 50 us a call.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    IMPLEMENTATIONS[name] = impls

    def detached(*args: Any) -> Any:
        return choose(name, impls, *args[:-1]).run(*args[:-1])

    def body(*args: Any) -> Any:
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        return detached(*args)

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
    if gradient is not None:
        torch.library.register_autograd(qualified, gradient, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.gs_kernels, name).default
    differentiable = op if gradient is None or setup_context is None else _function(body, gradient, setup_context)

    def run(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        eager = is_eager(*tensors)
        if eager and gradient is not None and _has_tangent(tensors):
            raise NotImplementedError(f"{name}: no forward-mode derivative (jvp); use backward or torch.autograd.grad")
        # anybody else who has to see a call: a tracer, a transform, a subclass of tensors
        if not eager or torch._C._functorch.peek_interpreter_stack() is not None:
            return op(*args)
        if not any(t.requires_grad for t in tensors):
            return detached(*args)
        return differentiable(*args) if torch.is_grad_enabled() else body(*args)

    return run


def _has_tangent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether forward-mode differentiation wants a derivative, which torch takes for 0 where there is no formula."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _no_view(output: Any) -> Any:
    """The same memory as no view of another tensor: autograd refuses to change a view in place behind a Function."""
    return output.detach() if isinstance(output, torch.Tensor) and output._is_view() else output


def _function(
    body: Callable[..., Any], gradient: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """body with its gradient, for eager mode."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = tree_map(_no_view, body(*args))
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(gradient)

    return Function.apply
