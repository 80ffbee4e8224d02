"""Lists what a call of public ops makes a GPU do, without the GPU: `traced(call, "sm_90")`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gs_kernels.aot.compile import Launch, record_launches, skip_launches
from gs_kernels.aot.ir_cost import KINDS
from gs_kernels.runtime.torch_op import NAMESPACE, OPS
from gs_kernels.runtime.torch_private import TorchDispatchMode, tree_leaves, tree_map_only

# position of an operand, and how many of its last sizes are summed over for each element of the result
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 1), "aten::bmm": (0, 1), "aten::linear": (0, 1)}
_PRODUCTS |= {"aten::convolution": (1, 3)}
_NOTHING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


@dataclass(frozen=True)
class Call:
    """Describes a call of a torch op. nbytes: of arguments and results. flops: of a product of operands of `kind`."""

    name: str
    nbytes: int
    flops: int = 0
    kind: str = ""


@dataclass
class Trace:
    """Lists what ran. launches: of Triton kernels, in order. calls: of torch's ops that compute, also in launchers."""

    launches: list[Launch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def _computes(op: Any) -> bool:
    """Returns False for views and allocations."""
    returns = op._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not view and op.name().partition(".")[0] not in _NOTHING


def _call(op: Any, args: tuple[Any, ...], results: Any) -> Call:
    name = op.name().partition(".")[0]
    tensors = {id(t): t for t in tree_leaves((args, results)) if isinstance(t, Tensor)}
    nbytes = sum(t.nbytes for t in tensors.values())
    if name not in _PRODUCTS:
        return Call(name, nbytes)
    position, summed = _PRODUCTS[name]
    operand = args[position]
    dtype = str(operand.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
    flops = 2 * math.prod(operand.shape[-summed:]) * results.numel()
    return Call(name, nbytes, flops, KINDS.get(dtype, "fp32"))


class _Counter(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **kwargs or {})
        if func.namespace == "aten" and _computes(func):
            self.trace.calls.append(_call(func, args, results))
        return results


class _Tracer(_Counter):
    """Lets an op of ours launch its kernels on meta tensors, then gives what it would give without this."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return super().__torch_dispatch__(func, types, args, kwargs)
        op = OPS[func._opname]
        launcher = next((impl for impl in op.impls if impl.name == "triton"), None)
        if launcher is not None:
            on_meta = op.unflatten(tree_map_only(Tensor, lambda t: t.detach().to("meta"), args))
            _launch(lambda: launcher.run(*on_meta), self.trace)
        return func(*args, **kwargs or {})


def _launch(call: Callable[[], Any], trace: Trace) -> None:
    call()
    # under a mode launches are no longer those of eager calls: count what is around them apart
    with skip_launches(), _Counter(trace):
        call()


def trace_launcher(call: Callable[[], Any], target: str) -> Trace:
    """Traces a call of launchers themselves, with meta tensors."""
    with record_launches(target) as launches:
        trace = Trace(launches)
        _launch(call, trace)
    return trace


def traced(call: Callable[[], Any], target: str) -> Trace:
    """Runs `call`, forward or with a backward inside, and lists what a GPU of this target would run for it.

    Args:
        call: its tensors may be meta tensors, or on a CPU, where they are computed too.
        target: a name of `gs_kernels.aot.TARGETS`.
    """
    with record_launches(target) as launches:
        trace = Trace(launches)
        with _Tracer(trace):
            call()
    return trace
