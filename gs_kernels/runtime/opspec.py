"""Defines what tests, the AOT gate and the benchmarks need to know of an op: data, not a framework.

`OPS` names the folders. `specs()` imports `gs_kernels.<folder>.spec` for each and returns every `OpSpec` found in its
`SPECS`. A new op is one folder and one word here; conformance, gradients, fences, AOT gate and benchmark come with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch

OPS: tuple[str, ...] = (
    "fake_quant",
    "observe",
    "search_clip_ratio",
    "requantize",
    "gram",
    "gptq_block",
    "score_candidates",
    "slb",
    "qmatmul",
    "qmatmul_grouped",
    "qconv2d",
    "hadamard",
    "kv_cache",
    "kl_divergence",
    "adder",
)

Shape: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Tol:
    """Bounds each element's difference from the reference: `|got - want| <= atol + rtol * |want|`; (0, 0) is exact."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Cost:
    """Counts bytes that must cross HBM once (nbytes) and floating-point operations that cannot be avoided (flops)."""

    nbytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """Holds one call, `run(*args, **kwargs)`. `grad_args` are the positions in args that may require a gradient."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_args: tuple[int, ...] = ()


@dataclass(frozen=True)
class AotCase:
    """Describes one launch to compile without a GPU: `launch()` calls the op's own launcher on meta tensors.

    Cases of one name are one launch, with bounds for different targets: `distinct_launches`.
    Bounds are for the whole kernel, on every target unless said: no spills ever; `max_regs` per thread;
    `max_instructions` issued per element by one thread (NVIDIA targets), `elements` being what one program handles,
    in one turn of its loop if it has one; `max_shared_stores` in the hot loop (NVIDIA), copies of the pipeline apart.
    main: the kernel that they are for, where others are launched too, which must not spill and must fit.
    older_max_regs: instead of max_regs, by version of Triton ("3.6"), where an older one takes more without spilling.
    overlapped (sm_90 only): every wgmma takes its left operand from registers, and no wait in the loop is for all.
    """

    name: str
    launch: Callable[[], Any]
    elements: int
    max_regs: int = 128
    older_max_regs: Mapping[str, int] = field(default_factory=dict)
    wide_loads: bool = True
    mma: str | None = None
    max_instructions: float | None = None
    main: str | None = None
    max_shared_stores: int | None = None
    overlapped: bool = False
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class OpSpec:
    """Describes an op: run, the public op; ref, the oracle; make(shape, dtype, device, generator), inputs of a call.

    keeps_strides: whether results of the shape of the first argument have its strides; else they are contiguous.
    memory_format: in which order of axes they are.
    regimes(every): launches that take what the tile rules tell apart, each with a name; else of each kind one or two.
    grad_tol: agreement of each gradient with the one autograd gives through `ref`, relative to its RMS.
    backward: True when the benchmark also times forward + backward.
    """

    name: str
    run: Callable[..., Any]
    ref: Callable[..., Any]
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Case]
    cost: Callable[[Shape, torch.dtype], Cost]
    tol: Mapping[torch.dtype, Tol]
    test_shapes: tuple[Shape, ...]
    bench_shapes: Mapping[str, tuple[Shape, ...]]
    keeps_strides: bool = True
    memory_format: torch.memory_format = torch.contiguous_format
    grad_tol: Mapping[torch.dtype, float] = field(default_factory=dict)
    aot: tuple[AotCase, ...] = ()
    regimes: Callable[[bool], Iterator[tuple[str, Callable[[], Any]]]] | None = None
    backward: bool = False
    backward_cost: Callable[[Shape, torch.dtype], Cost] | None = None


def distinct_launches(cases: Iterable[AotCase]) -> list[AotCase]:
    """Returns the cases of the gate by name, each once: the first of a name, with the targets of all.

    Raises:
        ValueError: if two cases of a name differ in elements, or share a target.
    """
    found: dict[str, AotCase] = {}
    for case in cases:
        first = found.setdefault(case.name, replace(case, targets=()))
        shared = set(first.targets) & set(case.targets)
        if shared or first.elements != case.elements:
            got = (
                f"both for {', '.join(sorted(shared))}" if shared else f"{first.elements} and {case.elements} elements"
            )
            raise ValueError(
                f"gs_kernels.aot: cases named {case.name} must be one launch with bounds for different targets, "
                f"got {got}; give them different names"
            )
        found[case.name] = replace(first, targets=(*first.targets, *case.targets))
    return list(found.values())


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> Any:
    """Applies the function to an argument of a call or, if that holds tensors by name, to each of those."""
    if isinstance(argument, torch.Tensor):
        return function(argument)
    if is_dataclass(argument) and not isinstance(argument, type):
        parts = {f.name: getattr(argument, f.name) for f in fields(argument)}
        return replace(argument, **{name: function(t) for name, t in parts.items() if isinstance(t, torch.Tensor)})
    return argument


def specs() -> tuple[OpSpec, ...]:
    return tuple(spec for folder in OPS for spec in importlib.import_module(f"gs_kernels.{folder}.spec").SPECS)
