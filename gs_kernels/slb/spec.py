"""Lists what tests, the AOT gate and the benchmarks run of SLB: shapes, tolerances, costs, launches.

A shape is `x` (sizes of the logits), `axis` and `group` (a scale always belongs to an output channel), `scaled`
(whether there is a scale), `last` (whether the weight is stored channels last), `tau` (the temperature), and for
optimizer steps `decay` and `momentum`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.spec import EXACT, launcher, meta
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol
from gs_kernels.slb.memory_format import CHANNELS_LAST
from gs_kernels.slb.op import slb_weight
from gs_kernels.slb.optimizer_step import slb_adamw_, slb_sgd_
from gs_kernels.slb.pack_codes import slb_codes, slb_pack
from gs_kernels.slb.ref import slb_adamw_ref, slb_codes_ref, slb_pack_ref, slb_sgd_ref, slb_weight_ref
from gs_kernels.slb.tiles import choose_tile

# exp2 of a GPU, or another order of a sum, may end on the neighbour after the one rounding to 16 bits
MIXED = {torch.float32: Tol(1e-5, 2e-6), torch.float16: Tol(1e-3, 2e-6), torch.bfloat16: Tol(8e-3, 2e-6)}
GRAD_TOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
UPDATED = {torch.float32: Tol(1e-6, 1e-6)}


def shape(x: tuple[int, ...], **more: Any) -> Shape:
    default = {"scaled": True, "last": False, "tau": 0.7, "decay": 0.01, "momentum": 0.9}
    return {"x": x, "axis": 0, "group": 0} | default | more


def _levels_of(s: Shape) -> int:
    return max(2, s["x"][1])


def _weights(s: Shape) -> int:
    return math.prod(s["x"]) // s["x"][1]


def make_logits(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draws normal logits; all levels of every seventh weight are tied."""
    logits = torch.randn(s["x"], generator=generator, device=device).to(dtype)
    logits.view(*s["x"][:2], -1)[:, :, ::7] = 0
    return logits


def _make_mix(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    levels = torch.linspace(-1, 1, _levels_of(s), device=device)
    scale = torch.rand(s["x"][0], generator=generator, device=device).add_(0.5)
    return levels, torch.full((1,), s["tau"], device=device), *((scale,) if s["scaled"] else ())


def make_weight(hard: bool, s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    logits = make_logits(s, dtype, device, generator)
    args = logits, *_make_mix(s, dtype, device, generator)
    kwargs: dict[str, Any] = {"hard": hard}
    if s["last"]:
        kwargs["memory_format"] = CHANNELS_LAST[len(s["x"]) - 1]
    return Case(args, kwargs, (() if hard else (0,)) + ((3,) if s["scaled"] else ()))


def make_codes(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return Case((make_logits(s, dtype, device, generator),), {})


def make_pack(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    fewest = max(1, (_levels_of(s) - 1).bit_length())
    return Case((make_logits(s, dtype, device, generator),), {"bits": 1 << (fewest - 1).bit_length()})


def make_update(adamw: bool, s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    """Draws the operands of a third step, with the moments that two earlier steps would leave."""
    logits = make_logits(s, dtype, device, generator)
    levels, temperature, *scale = _make_mix(s, dtype, device, generator)
    dw = torch.randn(s["x"][0], *s["x"][2:], generator=generator, device=device)
    if s["last"]:
        dw = dw.contiguous(memory_format=CHANNELS_LAST[dw.dim()])
    first = torch.randn(s["x"], generator=generator, device=device)
    state: tuple[Tensor | None, ...]
    if adamw:
        kwargs = {"lr": 0.01, "weight_decay": s["decay"]}
        state = first * 0.1, first.square() * 0.01, torch.full((1,), 3.0, device=device)
    else:
        kwargs = {"lr": 0.01, "weight_decay": s["decay"], "momentum": s["momentum"]}
        state = (first if s["momentum"] else None,)
    return Case((logits, dw, levels, temperature, *state, *scale), kwargs)


def adamw(logits: Tensor, dw: Tensor, levels: Tensor, tau: Tensor, *rest: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    """Calls `slb_adamw_` on copies of logits and state, and returns the copies."""
    state = _copies(logits, *rest[:2])
    slb_adamw_(state[0], dw, levels, tau, *state[1:], *rest[2:], **kwargs)
    return _strided_as(logits, state)


def sgd(
    logits: Tensor, dw: Tensor, levels: Tensor, tau: Tensor, buffer: Tensor | None, *scale: Tensor, **kwargs: Any
) -> tuple[Tensor, ...]:
    """Calls `slb_sgd_` on copies of logits and buffer, and returns the copies."""
    state = _copies(logits, *(() if buffer is None else (buffer,)))
    slb_sgd_(state[0], dw, levels, tau, state[1] if len(state) == 2 else None, *scale, **kwargs)
    return _strided_as(logits, state)


def _copies(*state: Tensor) -> list[Tensor]:
    return [t.clone(memory_format=torch.contiguous_format) for t in state]


def _strided_as(logits: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(state) if logits.is_contiguous() else tuple(torch.empty_like(logits).copy_(t) for t in state)


def forward_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n, planes = _weights(s), s["x"][1]
    return Cost(nbytes=n * (planes + 1) * dtype.itemsize, flops=n * (6 * planes + 2))


def backward_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n, planes = _weights(s), s["x"][1]
    return Cost(nbytes=n * (2 * planes + 1) * dtype.itemsize, flops=n * (9 * planes + 4))


def pack_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=n * dtype.itemsize + _weights(s) * max(1, (_levels_of(s) - 1).bit_length()) // 8, flops=2 * n)


def update_cost(tensors: int, s: Shape, dtype: torch.dtype) -> Cost:
    """Counts each state tensor as read and written twice: to copy it, and to update it."""
    n, planes = _weights(s), s["x"][1]
    return Cost(nbytes=n * (4 * tensors * planes + 1) * 4, flops=n * planes * (9 + 8 * tensors))


_NVIDIA = ("sm_90",)


def _aot(name: str, op: str, s: tuple[int, ...], dtype: torch.dtype, last: bool = False, **bounds: Any) -> AotCase:
    """Makes one launch with a scale, on logits `[O, L, K]` of a weight `[O, K / 9, 3, 3]` in bf16, with fp32 state."""
    o, planes, k = s
    logits, levels = meta(*s, dtype=dtype), meta(max(2, planes), dtype=torch.float32)
    one, scale = meta(1, dtype=torch.float32), meta(o, dtype=torch.float32)
    size = (o, k // 9, 3, 3)
    dw = meta(*size).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    state, frozen = meta(*s, dtype=torch.float32), meta(1, dtype=torch.bool)
    args: dict[str, tuple[Any, ...]] = {
        "slb_weight": (logits, levels, one, scale, size, False, last, torch.bfloat16),
        "slb_weight_backward": (dw, logits, levels, one, scale, False, True, True),
        "slb_pack": (logits, (max(2, planes) - 1).bit_length()),
        "slb_adamw_": (logits, dw, levels, one, state, state, one, scale, one, frozen, 0.0, 0.9, 0.999, 1e-8, 0.01),
        "slb_sgd_": (logits, dw, levels, one, state, scale, one, frozen, 0.0, 0.9, 0.01, False),
    }
    tile = choose_tile(o, k, planes, dtype.itemsize, vectors_max=1 if op.endswith("_") else 2)
    return AotCase(name, launcher(op, "slb", *args[op]), elements=tile.rows * tile.cols, **bounds)


# instructions per weight; at 3 TB/s an H100 has time for 9.9 of them per byte moved
WEIGHT_AOT = (
    # Triton 3.6 holds all 16 levels of a weight in registers on sm_100: 168 of them, 12 warps an SM, and no spill
    _aot("4bit-bf16", "slb_weight", (512, 16, 4608), torch.bfloat16, max_instructions=170, older_max_regs={"3.6": 168}),
    _aot("1bit-bf16", "slb_weight", (512, 1, 4608), torch.bfloat16, max_regs=64, max_instructions=24, targets=_NVIDIA),
    _aot("2bit-fp32", "slb_weight", (512, 4, 576), torch.float32, max_regs=48, max_instructions=60, targets=_NVIDIA),
    _aot("2bit-last", "slb_weight", (512, 4, 4608), torch.bfloat16, True, max_instructions=68, targets=_NVIDIA),
)
BACKWARD_AOT = (
    _aot("4bit-grad-bf16", "slb_weight_backward", (512, 16, 4608), torch.bfloat16, max_regs=255, max_instructions=255),
    _aot("2bit-grad-bf16", "slb_weight_backward", (512, 4, 4608), torch.bfloat16, max_instructions=80, targets=_NVIDIA),
    _aot("1bit-grad-bf16", "slb_weight_backward", (512, 1, 4608), torch.bfloat16, max_instructions=37, targets=_NVIDIA),
)
PACK_AOT = (_aot("4bit-bf16", "slb_pack", (512, 16, 4608), torch.bfloat16, max_instructions=140, targets=_NVIDIA),)
ADAMW_AOT = (
    _aot("2bit-fp32", "slb_adamw_", (512, 4, 4608), torch.float32, max_instructions=240),
    _aot("4bit-bf16", "slb_adamw_", (512, 16, 4608), torch.bfloat16, max_regs=255, targets=_NVIDIA),
)
SGD_AOT = (_aot("4bit-fp32", "slb_sgd_", (512, 16, 4608), torch.float32, targets=_NVIDIA),)

# one plane, levels that fill a chunk or two or not, filters, rows below and above a tile
TEST_SHAPES = (
    shape((1, 2, 1)),
    shape((3, 1, 7, 5), scaled=False),
    shape((7, 3, 9, 4, 4), last=True),
    shape((2, 16, 1025), tau=0.05),
    shape((9, 17, 31), tau=5.0),
)
CODES_SHAPES = (shape((1, 2, 1)), shape((3, 1, 7, 5), scaled=False), shape((9, 17, 3, 11)))
UPDATE_SHAPES = (
    shape((3, 1, 7, 5), momentum=0.0),
    shape((5, 4, 1031), scaled=False, decay=0.0),
    shape((9, 17, 3, 4, 4), last=True),
)
BENCH_SHAPES = {
    "cpu": (shape((512, 4, 4608), scaled=False), shape((512, 16, 4608), scaled=False)),
    "resnet18": tuple(
        shape((o, levels, c, 3, 3), scaled=False) for levels in (1, 2, 4, 16) for o, c in ((64, 64), (512, 512))
    ),
    "4096x4096": tuple(shape((4096, levels, 4096), scaled=False) for levels in (1, 2, 4, 16)),
}

SPECS = (
    OpSpec(
        name="slb_weight",
        run=slb_weight,
        ref=slb_weight_ref,
        make=partial(make_weight, False),
        cost=forward_cost,
        tol=MIXED,
        grad_tol=GRAD_TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=WEIGHT_AOT + BACKWARD_AOT,
        backward=True,
        backward_cost=backward_cost,
    ),
    OpSpec(
        name="slb_weight_hard",
        run=slb_weight,
        ref=slb_weight_ref,
        make=partial(make_weight, True),
        cost=forward_cost,
        tol=EXACT,
        grad_tol=GRAD_TOL,
        test_shapes=CODES_SHAPES,
        bench_shapes={"cpu": BENCH_SHAPES["cpu"]},
    ),
    OpSpec(
        name="slb_codes",
        run=slb_codes,
        ref=slb_codes_ref,
        make=make_codes,
        cost=pack_cost,
        tol=EXACT,
        test_shapes=CODES_SHAPES,
        bench_shapes={},
    ),
    OpSpec(
        name="slb_pack",
        run=slb_pack,
        ref=slb_pack_ref,
        make=make_pack,
        cost=pack_cost,
        tol=EXACT,
        test_shapes=CODES_SHAPES,
        bench_shapes={"cpu": BENCH_SHAPES["cpu"], "4096x4096": BENCH_SHAPES["4096x4096"]},
        aot=PACK_AOT,
    ),
    OpSpec(
        name="slb_adamw_",
        run=adamw,
        ref=slb_adamw_ref,
        make=partial(make_update, True),
        cost=partial(update_cost, 3),
        tol=UPDATED,
        test_shapes=UPDATE_SHAPES,
        bench_shapes={"cpu": BENCH_SHAPES["cpu"], "resnet18": BENCH_SHAPES["resnet18"]},
        aot=ADAMW_AOT,
    ),
    OpSpec(
        name="slb_sgd_",
        run=sgd,
        ref=slb_sgd_ref,
        make=partial(make_update, False),
        cost=partial(update_cost, 2),
        tol=UPDATED,
        test_shapes=UPDATE_SHAPES,
        bench_shapes={"cpu": BENCH_SHAPES["cpu"], "resnet18": BENCH_SHAPES["resnet18"]},
        aot=SGD_AOT,
    ),
)
