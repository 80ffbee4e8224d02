"""Lists what tests, the AOT gate and the benchmarks run of quantized keys and values: shapes, costs, launches.

A shape is `x` (sizes `[B, H, T, D]` of the tokens), `group` (elements that share a scale), `four` (codes of 4 bits) and
`room`, tokens that the cache has beside those.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.spec import EXACT, launcher, make_x, meta
from gs_kernels.kv_cache.op import kv_read, kv_write_
from gs_kernels.kv_cache.ref import kv_codes_ref, kv_read_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape


def shape(*sizes: int, group: int = 0, four: bool = False, room: int = 0) -> Shape:
    return {"x": sizes, "axis": -1, "group": group or sizes[-1], "four": four, "room": room}


def written(x: Tensor, codes: Tensor, scale: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `kv_write_` makes of copies of a cache."""
    codes, scale = codes.clone(), scale.clone()
    kv_write_(codes, scale, x, position)
    return codes, scale


def written_ref(x: Tensor, codes: Tensor, scale: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[2], device=x.device) + position
    new_codes, new_scale = kv_codes_ref(x, scale.shape[-1], codes.dtype)
    return codes.index_copy(2, at, new_codes), scale.index_copy(2, at, new_scale)


def _cache(s: Shape, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    b, h, tokens, size = s["x"]
    form = (b, h, tokens + s["room"])
    low, high, width, dtype = (0, 256, -(-size // 2), torch.uint8) if s["four"] else (-127, 128, size, torch.int8)
    codes = torch.randint(low, high, (*form, width), generator=generator, device=device, dtype=dtype)
    scale = torch.rand((*form, size // s["group"]), generator=generator, device=device) + 0.5
    return codes, scale


def make_write(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x = make_x(s, dtype, device, generator)
    if x.shape[2] > 4:  # tokens that are 0, tiny, and hold a NaN
        x[:, :, 1], x[:, :, 2], x[0, 0, 3, 0] = 0.0, x[:, :, 2] * 1e-30, float("nan")
    codes, scale = _cache(s, device, generator)
    return Case((x, codes, scale, torch.full((1,), s["room"] // 2, device=device)), {})


def make_read(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return Case(_cache(s, device, generator), {"size": s["x"][-1], "dtype": dtype})


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=n * dtype.itemsize + n // (1 + s["four"]) + 4 * n // s["group"], flops=6 * n)


def _aot(name: str, op: str, *args: Any, **bounds: Any) -> AotCase:
    return AotCase(name, launcher(op, "kv_cache", *args), elements=4096, **bounds)


_INT8 = meta(8, 8, 4096, 128, dtype=torch.int8), meta(8, 8, 4096, 1, dtype=torch.float32)
_INT4 = meta(8, 8, 4096, 64, dtype=torch.uint8), meta(8, 8, 4096, 2, dtype=torch.float32)
_X, _AT = meta(8, 8, 1024, 128), meta(1, dtype=torch.int64)
_NVIDIA = ("sm_90",)

SHAPES = (
    shape(1, 1, 1, 1),
    shape(1, 1, 1, 1, four=True, room=1),
    shape(2, 3, 5, 7, room=3),
    shape(2, 3, 5, 7, four=True),
    shape(1, 2, 65, 64, room=2),
    shape(2, 1, 31, 80, group=40, four=True, room=5),
    shape(1, 1, 17, 192, group=64, four=True, room=1),
    shape(1, 2, 66, 128, group=64, four=True),
)
BENCH = {
    "cpu": (shape(1, 8, 1024, 128), shape(1, 8, 1024, 128, group=64, four=True)),
    "llama3_8b": (shape(16, 8, 4096, 128), shape(16, 8, 4096, 128, group=64, four=True)),
}

SPECS = (
    OpSpec(
        name="kv_write_",
        run=written,
        ref=written_ref,
        make=make_write,
        cost=cost,
        tol=EXACT,
        test_shapes=SHAPES,
        bench_shapes=BENCH,
        keeps_strides=False,
        aot=(
            _aot("int8", "kv_write_", *_INT8, _X, _AT),
            _aot("int4", "kv_write_", *_INT4, _X, _AT),
        ),
    ),
    OpSpec(
        name="kv_read",
        run=kv_read,
        ref=kv_read_ref,
        make=make_read,
        cost=cost,
        tol=EXACT,
        test_shapes=SHAPES,
        bench_shapes=BENCH,
        keeps_strides=False,
        aot=(
            _aot("int8", "kv_read", *_INT8, 128, torch.bfloat16),
            _aot("int4", "kv_read", *_INT4, 128, torch.bfloat16),
        ),
    ),
)
