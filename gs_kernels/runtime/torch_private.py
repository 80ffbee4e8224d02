"""Collects what gs_kernels and gs_algos use from private paths of PyTorch, checked with torch 2.11 to 2.15.

No other file may import or call one, `torch...._name`, which tests/kernels/runtime/test_torch_private.py checks: what a
new version of PyTorch moves or drops is mended here. Operators (`aten._unsafe_view`), which files and graphs hold by
name, and private attributes of objects (`tensor._version`, `module._buffers`) are used where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    MappingKey,
    SequenceKey,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "PLAIN",
    "FunctionalTensorMode",
    "MappingKey",
    "SequenceKey",
    "TorchDispatchMode",
    "_BatchNorm",
    "_ConvNd",
    "_ConvTransposeNd",
    "_NormBase",
    "autocasts",
    "compile_package",
    "convolve_prepacked",
    "current_gpu",
    "dispatch_modes",
    "foreach_add_",
    "foreach_copy_",
    "foreach_zero_",
    "function_modes",
    "has_global_hooks",
    "is_compiling",
    "is_composite",
    "is_eager",
    "is_plain_call",
    "is_tracing",
    "is_view",
    "keeps_triton_ops",
    "linear_of_onednn",
    "load_package",
    "make_wrapper",
    "prepack_filters",
    "transform_of",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "triton_launches_directly",
    "wants_tangents",
]

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types of tensors that nobody overrides

# C functions, called as they are: a Python function around one would be a frame more in every call
transform_of: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack  # of torch.func; None outside of any
foreach_add_: Callable[..., Any] = torch._foreach_add_
foreach_copy_: Callable[..., Any] = torch._foreach_copy_
foreach_zero_: Callable[..., Any] = torch._foreach_zero_
# of CUDA tensors, which have started CUDA; a build without CUDA has none of either
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
autocasts: Callable[[], bool] = torch._C._is_any_autocast_enabled  # for any kind of device
is_compiling: Callable[[], bool] = torch.compiler.is_compiling
is_tracing: Callable[[], bool] = torch._C._is_tracing  # a trace knows ops, and not what C++ writes into memory
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
function_modes: Callable[[], int] = torch._C._len_torch_function_stack
make_wrapper: Callable[..., Any] = Tensor._make_wrapper_subclass  # a tensor of a subclass, without memory of its own


# of oneDNN: filters in the memory order of one size of images, and the convolution with them. None without oneDNN
prepack_filters: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
_pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
convolve_prepacked: Callable[..., Tensor] | None = getattr(_pointwise, "default", None)  # not chosen in every call
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
linear_of_onednn: Callable[..., Tensor] | None = getattr(_linear, "default", None)


def is_eager(*tensors: Tensor, plain: frozenset[type] = PLAIN) -> bool:
    """Says whether these are real tensors outside any tracing: only then may a body look at values.

    plain: the types of tensors that count as such.
    """
    return not (is_compiling() or is_tracing() or dispatch_modes()) and plain.issuperset(map(type, tensors))


def is_plain_call(x: Tensor, *, plain: frozenset[type] = PLAIN) -> bool:
    """Says whether a call with x gives values alone: `is_eager`, no transform of torch.func, no derivative."""
    return (
        not (is_compiling() or is_tracing() or dispatch_modes())
        and type(x) in plain
        and transform_of() is None
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


@cache
def is_composite(op: Any) -> bool:
    """Says whether an operator is made of others: PyTorch takes it apart beforehand, but not in inference mode."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def wants_tangents() -> bool:
    """Returns whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def is_view(t: Tensor) -> bool:
    """Returns whether autograd takes t for a view of another tensor."""
    return t._is_view()


def keeps_triton_ops() -> bool:
    """Returns whether `torch.export` wants an op of ours as one node, and not what it does."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())


def triton_launches_directly() -> AbstractContextManager[None]:
    """Returns a context in which `torch.library.wrap_triton` launches a kernel at once, under tracing too."""
    from torch._library.triton import set_wrap_triton_enabled

    return set_wrap_triton_enabled(False)


def compile_package(program: Any, path: str, metadata: dict[str, str]) -> None:
    """Compiles an exported program to a .pt2 package that holds the metadata."""
    configs = {"aot_inductor.metadata": metadata}
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


def load_package(path: str, device_index: int) -> Any:
    """Loads a .pt2 package, which then is a function; device_index: -1 for that of the package."""
    return torch._inductor.aoti_load_package(path, device_index=device_index)
