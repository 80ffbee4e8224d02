"""Lists launches of packed products for the AOT gate, with the bounds that their machine code has to keep."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.qmatmul.tiles import BROAD, FEW_ROWS, MANY, PAIR, Plan, default_int8_rule, default_rule, rows_tile
from gs_kernels.runtime.opspec import AotCase

N, K = 14336, 4096
ALL = ("sm_80", "sm_90", "sm_100", "gfx942")
ELSEWHERE = ("sm_80", "sm_100", "gfx942")
HOPPER = ("sm_90",)
BLACKWELL = ("sm_100",)


def _meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _weight(bits: int, group: int, points: bool, dtype: torch.dtype) -> PackedWeight:
    scale = _meta(N, K // group, dtype=dtype)
    zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    codes = _meta(K // 128, N, 8 * bits, dtype=torch.int16)
    return PackedWeight(codes, scale, scale if points else zero, None, bits, (N, K), group, PLANAR)


def _shared(plan: Plan, shared: bool, sm: int, sm_count: int) -> Plan:
    """Returns the plan with a tile each, or with equal shares whatever the rules would do: so many as an SM holds."""
    each = 2 if plan.warps == 4 else 1
    return replace(
        plan, shares=each * sm_count if shared else 0, per_sm=each if shared else 1, early=shared and sm >= 90
    )


def _plan(bits: int, m: int, x_bits: int, tiles: str, sm: int) -> Plan:
    """Returns the plan for m rows whose tiles have m rows, where there is one, else the first of the rule."""
    if tiles == "pair":
        return PAIR
    if tiles == "broad":
        return next(rule.others[0] for rule in BROAD if m == rule.rows)
    rule = default_rule(m, sm)
    if x_bits == 32:
        return replace(rule.plan, block_n=rule.plan.block_n // 2)
    most = 128 if bits == 8 else 256
    return next((plan for plan in (rule.plan, *rule.others) if plan.block_m == m <= most), rule.plan)


def _launcher(
    bits: int, m: int, group: int, points: bool, dtype: torch.dtype, shared: bool, tiles: str
) -> Callable[[], Any]:
    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        x = _meta(m, K, dtype=dtype)
        asm, sm, sm_count = kernel.device_of(x)
        plan = _plan(bits, m, 8 * x.itemsize, tiles, sm)
        weight = _weight(bits, group, points, dtype)
        return kernel.multiply(x, weight, None, "none", _shared(plan, shared, sm, sm_count), asm)

    return run


def matmul(
    bits: int,
    m: int,
    *,
    group: int = 128,
    points: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shared: bool = False,
    tiles: str = "",
    **bounds: Any,
) -> AotCase:
    """Launches a product.

    Args:
        shared: programs take equal shares of its blocks, else a tile each.
        tiles: "broad" of 256 columns, "pair" of 128 rows by four warps; "" those of the rule.
    """
    kind = f"{'-points' if points else ''}{tiles and f'-{tiles}'}{'-shared' if shared else ''}"
    name = f"w{bits}-m{m}-g{group}{kind}-{str(dtype).removeprefix('torch.')}"
    block_n = _plan(bits, m, 8 * dtype.itemsize, tiles, 90).block_n
    launch = _launcher(bits, m, group, points, dtype, shared, tiles)
    return AotCase(name, launch, elements=128 * block_n, **({"max_regs": 255} | bounds))


def dequantize(bits: int, **bounds: Any) -> AotCase:
    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel.dequantize")
        return kernel.dequantize(_weight(bits, 128, True, torch.bfloat16), torch.bfloat16)

    return AotCase(f"dequantize-w{bits}", run, elements=128 * 32, **bounds)


def _int8_plan(m: int, group: int, tile: tuple[int, int] | None, sm: int) -> Plan:
    """Returns the plan of large tiles with so many rows and columns; None: the first of the rule for m rows."""
    if tile is None:
        return default_int8_rule(m, K, group, False, sm).plan
    return replace(MANY, block_m=tile[0], block_n=tile[1])


def _int8_name(m: int, kind: str, shared: bool, tile: tuple[int, int] | None) -> str:
    sizes = "" if tile is None else f"-{tile[0]}x{tile[1]}"
    return f"m{m}{kind}{sizes}{'-shared' if shared else ''}"


def matmul_fp8(
    bits: int, m: int, *, shared: bool = False, tile: tuple[int, int] | None = None, **bounds: Any
) -> AotCase:
    """Launches a product of 8-bit floats; shared: as of `matmul`, tile: rows and columns, if not the usual ones."""

    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        _, sm, sm_count = kernel.device_of(_meta(1))
        plan = _shared(_int8_plan(m, 128, tile, sm), shared, sm, sm_count)
        x8, sums = _meta(m, K, dtype=torch.float8_e4m3fn), _meta(K // 128, m, dtype=torch.float32)
        x_scale, weight = _meta(m, dtype=torch.float32), _weight(bits, 128, False, torch.bfloat16)
        return kernel.multiply_int8(x8, x_scale, sums, None, weight, None, "none", torch.bfloat16, plan, True)

    elements = 128 * (128 if tile is None else tile[1])
    return AotCase(f"w{bits}f8-{_int8_name(m, '', shared, tile)}", run, elements, **({"max_regs": 255} | bounds))


def matmul_int8(
    bits: int,
    m: int,
    *,
    group: int,
    zero: bool = False,
    points: bool = False,
    shared: bool = False,
    tile: tuple[int, int] | None = None,
    **bounds: Any,
) -> AotCase:
    """Launches a product of 8-bit rows; zero: x has a zero point and one scale, as between converted layers.

    points, shared: as of `matmul`; tile: as of `matmul_fp8`.
    """

    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        asm, sm, sm_count = kernel.device_of(_meta(1))
        plan = _shared(_int8_plan(m, group, tile, sm), shared, sm, sm_count)
        weight, x = _weight(bits, group, points, torch.float32), _meta(m, K, dtype=torch.int8)
        x_scale = _meta(1 if zero else m, dtype=torch.float32)
        grid = (_meta(1, dtype=torch.float32), _meta(N, K // group, dtype=torch.int32)) if zero else None
        return kernel.multiply_int8(x, x_scale, None, grid, weight, None, "none", torch.bfloat16, plan, asm)

    kind = f"-g{group}{'-zero' if zero else ''}{'-points' if points else ''}"
    elements = 128 * (128 if tile is None else tile[1])
    return AotCase(f"w{bits}a8-{_int8_name(m, kind, shared, tile)}", run, elements, **({"max_regs": 255} | bounds))


def matmul_fp4(name: str, m: int, **bounds: Any) -> AotCase:
    """Launches a product with 4-bit floats, `mxfp4` or `nvfp4`."""

    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        group, dtype = (32, torch.float8_e8m0fnu) if name == "mxfp4" else (16, torch.float8_e4m3fn)
        scale, levels = _meta(N, K // group, dtype=dtype), _meta(16, dtype=torch.float32)
        divisor = None if name == "mxfp4" else _meta(1, dtype=torch.float32)
        codes = _meta(K // 128, N, 32, dtype=torch.int16)
        weight = PackedWeight(codes, scale, 0.0, levels, 4, (N, K), group, PLANAR, divisor)
        return kernel.qmatmul_triton(_meta(m, K), weight, None, "none")

    return AotCase(f"{name}-m{m}", run, elements=128 * 128, **({"max_regs": 255} | bounds))


def quantize_rows(k: int, **bounds: Any) -> AotCase:
    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        return kernel.quantize(_meta(2048, k), torch.int8)

    block_m, block_k, _ = rows_tile(2048, k)
    return AotCase(f"k{k}", run, elements=block_m * block_k, **bounds)


FLOATS = (torch.bfloat16, torch.float32, torch.float16)
# group size and K, zero points; the last have a group that ends inside a block, and a K that does
GRIDS = (
    *((128, K, "middle"), (32, K, "points"), (K, K, "points"), (64, K, "points"), (128, K, "levels")),
    (96, K - 64, "half"),
)
ROWS_OF_RULES = (16, 256, 32, 64)


def _any_weight(bits: int, group: int, k: int, zero: str, dtype: torch.dtype) -> PackedWeight:
    scale = _meta(N, k // group, dtype=dtype)
    middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    point = scale if zero == "points" else {"half": middle - 0.5, "levels": 0.0}.get(zero, middle)
    levels = _meta(2**bits, dtype=torch.float32) if zero == "levels" else None
    codes = _meta(-(-k // 128), N, 8 * bits, dtype=torch.int16)
    return PackedWeight(codes, scale, point, levels, bits, (N, k), group, PLANAR)


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields products of float rows: of each dtype, width, grid and rule of rows."""
    for dtype, bits, (group, k, zero), m in itertools.product(
        FLOATS[: 3 if every else 2], (4, 8, 2, 1)[: 4 if every else 2], GRIDS[: 6 if every else 2], ROWS_OF_RULES
    ):
        if m > FEW_ROWS and (dtype == torch.float32 or zero == "levels"):
            continue  # dequantized once

        def run(
            dtype: Any = dtype, bits: int = bits, group: int = group, k: int = k, zero: str = zero, m: int = m
        ) -> Any:
            kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
            weight = _any_weight(bits, group, k, zero, dtype)
            return kernel.qmatmul_triton(_meta(m, k, dtype=dtype), weight, None, "none")

        yield f"w{bits}-m{m}-g{group}-{zero}-{str(dtype).removeprefix('torch.')}", run


def int8_regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields products of 8-bit rows: of each width, grid and rule of rows, of integers and of 8-bit floats."""
    grids = [grid for grid in GRIDS if grid[2] != "levels"]
    for bits, (group, k, zero), m, fp8 in itertools.product(
        (4, 8, 2, 1)[: 4 if every else 2], grids[: 5 if every else 2], ROWS_OF_RULES[: 4 if every else 2], (False, True)
    ):
        if fp8 and bits > 4:
            continue

        def run(bits: int = bits, group: int = group, k: int = k, zero: str = zero, m: int = m, fp8: bool = fp8) -> Any:
            kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
            weight = _any_weight(bits, group, k, zero, torch.float32)
            if fp8:
                return kernel.qmatmul_fp8_triton(_meta(m, k), weight, None, "none")
            x, x_scale = _meta(m, k, dtype=torch.int8), _meta(m, dtype=torch.float32)
            return kernel.qmatmul_int8_triton(x, x_scale, weight, None, None, None, "none", torch.bfloat16)

        yield f"w{bits}{'f8' if fp8 else 'a8'}-m{m}-g{group}-{zero}", run


# few rows: what one weight may cost before an H100 issues instructions for longer than it reads is 4.4 at 4 bits, 2.2
# at 2 and 1.1 at 1. More rows: weights stay in registers between their bytes and the product, which is not waited for
FEW: dict[str, Any] = {"mma": "HGMMA", "max_regs": 168, "max_shared_stores": 4, "targets": HOPPER}
MORE: dict[str, Any] = {"mma": "HGMMA", "max_shared_stores": 4, "overlapped": True, "targets": HOPPER}
# of shares two programs an SM are all that there are: they may fill it. What adds their parts has no bounds of its own
SHARED: dict[str, Any] = {"main": "_qmatmul_kernel", "mma": "HGMMA", "max_shared_stores": 4, "targets": HOPPER}
FEW_SHARED = SHARED | {"max_regs": 168}
MORE_SHARED = SHARED | {"overlapped": True}

MATMUL = (
    matmul(4, 16, max_instructions=2.4, **FEW),
    matmul(2, 16, max_instructions=2.2, **FEW),
    matmul(1, 16, max_instructions=2.1, **FEW),
    matmul(8, 16, max_instructions=2.7, **FEW),
    matmul(4, 64, max_instructions=2.7, **MORE),
    matmul(4, 16, shared=True, max_instructions=2.4, **FEW_SHARED),
    matmul(2, 16, shared=True, max_instructions=2.2, **FEW_SHARED),
    matmul(1, 16, shared=True, max_instructions=2.1, **FEW_SHARED),
    matmul(8, 16, shared=True, max_instructions=2.7, **SHARED),
    matmul(4, 64, shared=True, max_instructions=2.7, **MORE_SHARED),
    matmul(4, 64, shared=True, tiles="broad", max_instructions=2.7, **MORE_SHARED),
    matmul(8, 64, shared=True, tiles="broad", max_instructions=2.9, **MORE_SHARED),
    matmul(4, 32, shared=True, tiles="broad", max_instructions=2.6, **MORE_SHARED),
    matmul(4, 64, group=32, points=True, shared=True, tiles="broad", **MORE_SHARED | {"max_shared_stores": 8}),
    matmul(4, 128, tiles="pair", max_instructions=2.7, **MORE),
    matmul(2, 128, tiles="pair", max_instructions=2.6, **MORE),
    matmul(1, 128, tiles="pair", max_instructions=3.0, **MORE),
    matmul(4, 128, tiles="pair", dtype=torch.float16, max_instructions=3.2, **MORE),
    matmul(4, 128, group=32, tiles="pair", max_instructions=3.1, **MORE),
    matmul(4, 128, max_instructions=3.6, **MORE),
    matmul(4, 128, shared=True, max_instructions=3.6, **MORE_SHARED),
    # of tiles of 256 rows, where a weight serves twice as many as in those of 128
    matmul(4, 256, max_instructions=4.0, **MORE),
    matmul(4, 256, dtype=torch.float16, max_instructions=4.4, **MORE),
    matmul(2, 256, max_instructions=4.0, **MORE),
    matmul(1, 256, max_instructions=4.2, **MORE),
    matmul(8, 256, max_instructions=3.8, **MORE),
    matmul(4, 256, group=64, points=True, max_instructions=6, **MORE),
    matmul(4, 64, tiles="broad", max_instructions=2.7, **MORE),
    matmul(4, 64, tiles="broad", max_instructions=2.5, targets=BLACKWELL),
    matmul(4, 64, shared=True, tiles="broad", targets=BLACKWELL),
    matmul(8, 64, shared=True, tiles="broad", targets=BLACKWELL),
    matmul(4, 32, shared=True, tiles="broad", targets=BLACKWELL),
    matmul(4, 64, group=32, points=True, shared=True, tiles="broad", targets=BLACKWELL),
    matmul(4, 16, targets=ELSEWHERE),
    matmul(4, 256, targets=ELSEWHERE),
    matmul(4, 16, shared=True, targets=ELSEWHERE),
    matmul(4, 64, shared=True, targets=ELSEWHERE),
    matmul(4, 16, dtype=torch.float32, targets=HOPPER),
    dequantize(4, targets=HOPPER),
    matmul_fp4("mxfp4", 16, targets=ALL),
    matmul_fp4("nvfp4", 16, targets=ALL),
    matmul_fp4("nvfp4", 256, targets=ALL),
)
INT8_SHARED: dict[str, Any] = {"main": "_qmatmul_int8_kernel", "shared": True, "max_shared_stores": 4}
INT8 = (
    matmul_int8(4, 16, group=128, mma="IGMMA", max_instructions=2.0, max_shared_stores=4, targets=HOPPER),
    # all codes of a container in one thread, and then through shared memory, were 5.2 instructions a weight
    matmul_int8(1, 16, group=128, mma="IGMMA", max_instructions=1.7, max_shared_stores=4, targets=HOPPER),
    matmul_int8(4, 16, group=128, mma="IGMMA", max_instructions=2.0, **INT8_SHARED, targets=HOPPER),
    matmul_int8(1, 16, group=128, mma="IGMMA", max_instructions=1.7, **INT8_SHARED, targets=HOPPER),
    matmul_int8(8, 64, group=K, zero=True, mma="IGMMA", max_instructions=2.5, **INT8_SHARED, targets=HOPPER),
    matmul_int8(4, 64, group=128, max_instructions=3.6, **INT8_SHARED, targets=("sm_80", "sm_90")),
    matmul_int8(4, 16, group=128, **INT8_SHARED, targets=("sm_80", "sm_100", "gfx942")),
    matmul_int8(4, 64, group=128, points=True, **INT8_SHARED, targets=HOPPER),  # gets a tile each: shares would spill
    matmul_int8(1, 64, group=128, max_instructions=3.6, max_shared_stores=4, targets=("sm_80", "sm_90")),
    matmul_int8(8, 256, group=K, mma="IGMMA", max_instructions=2.5, max_shared_stores=4, targets=HOPPER),
    matmul_int8(8, 256, group=K, zero=True, mma="IGMMA", max_instructions=2.5, max_shared_stores=4, targets=HOPPER),
    matmul_int8(
        4, 64, group=128, tile=(64, 256), mma="IGMMA", max_instructions=2.5, max_shared_stores=4, targets=HOPPER
    ),
    matmul_int8(4, 64, group=128, tile=(64, 256), targets=("sm_80", "sm_100", "gfx942")),
    matmul_int8(4, 64, group=128, tile=(64, 256), mma="IGMMA", max_instructions=2.5, **INT8_SHARED, targets=HOPPER),
    matmul_int8(4, 64, group=128, tile=(64, 256), **INT8_SHARED, targets=("sm_80", "sm_100", "gfx942")),
    matmul_int8(4, 32, group=128, tile=(32, 256), mma="IGMMA", max_instructions=2.0, **INT8_SHARED, targets=HOPPER),
    matmul_int8(4, 32, group=128, tile=(32, 256), **INT8_SHARED, targets=("sm_80", "sm_100", "gfx942")),
    matmul_int8(8, 64, group=K, tile=(64, 256), zero=True, mma="IGMMA", max_instructions=1.6, targets=HOPPER),
    matmul_int8(8, 256, group=K, tile=(128, 256), mma="IGMMA", max_instructions=1.6, targets=HOPPER),
    matmul_int8(8, 256, group=K, tile=(128, 256), zero=True, mma="IGMMA", max_instructions=1.6, targets=HOPPER),
    matmul_int8(4, 256, group=K, tile=(128, 256), zero=True, mma="IGMMA", max_instructions=1.6, targets=HOPPER),
    matmul_int8(8, 256, group=K, tile=(256, 128), max_instructions=2.6, targets=("sm_90", "sm_100")),
    matmul_int8(8, 256, group=K, tile=(256, 128), zero=True, max_instructions=2.6, targets=("sm_90", "sm_100")),
    matmul_int8(4, 256, group=32, max_shared_stores=16, targets=("sm_90", "sm_100")),
    matmul_int8(8, 256, group=K, targets=("sm_80", "gfx942")),
)
FP8 = (
    matmul_fp8(4, 16, mma="QGMMA", max_instructions=4.4, **INT8_SHARED, targets=HOPPER),
    matmul_fp8(4, 64, mma="QGMMA", max_instructions=4.4, **INT8_SHARED, targets=HOPPER),
    matmul_fp8(4, 64, tile=(64, 256), mma="QGMMA", max_instructions=3.0, max_shared_stores=4, targets=HOPPER),
    matmul_fp8(4, 64, tile=(64, 256), mma="QGMMA", max_instructions=3.0, **INT8_SHARED, targets=HOPPER),
    matmul_fp8(4, 64, tile=(64, 256), **INT8_SHARED, targets=BLACKWELL),
    matmul_fp8(4, 256, mma="QGMMA", max_regs=208, max_instructions=4.4, max_shared_stores=4, targets=HOPPER),
)
ROWS = (quantize_rows(4096, max_instructions=26, targets=HOPPER), quantize_rows(14336, targets=("sm_80", "gfx942")))
