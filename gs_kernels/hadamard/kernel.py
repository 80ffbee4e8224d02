"""Multiplies with Hadamard matrices on a GPU: rows stay in registers for all factors, and for their int8 codes."""


import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.hadamard.matrices import hadamard_block, hadamard_matrix
from gs_kernels.hadamard.tiles import Tile, choose_tile
from gs_kernels.qmatmul.kernel import rows_of
from gs_kernels.qmatmul.kernel.quantize_rows import quantize, row_codes
from gs_kernels.qmatmul.ref import LEVELS
from gs_kernels.runtime.bound_calls import fresh, lasting
from gs_kernels.runtime.dispatch import launch
from gs_kernels.runtime.torch_private import is_eager
from gs_kernels.triton_lib import inverse, qparams, reduce_range


@triton.jit
def _sylvester(R: tl.constexpr):
    """Makes Sylvester's matrix `[R, R]`, R at most 256: -1 to the ones in `i & j`."""
    i = tl.arange(0, R)
    ones = i[:, None] & i[None, :]
    ones ^= ones >> 4
    ones ^= ones >> 2
    ones ^= ones >> 1
    return (1 - 2 * (ones & 1)).to(tl.float32)


@triton.jit
def _product(v, matrix, PARTS: tl.constexpr):
    """Multiplies fp32 v with 1, -1 and 0 on tensor cores. PARTS 1: v has 11 bits; 2: it is cut into two such."""
    if PARTS == 1:
        y = tl.dot(v, matrix, input_precision="tf32")
    else:
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        y = tl.dot(high, matrix, tl.dot(v - high, matrix, input_precision="tf32"), input_precision="tf32")
    return y


@triton.jit
def _last_factor(v, matrix, ROWS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Multiplies the last axis of the factors of each of ROWS rows `[SIZE]` with its matrix, and makes it the first."""
    R: tl.constexpr = matrix.shape[0]
    y = _product(tl.reshape(v, (ROWS * SIZE // R, R)), matrix, PARTS)
    if R < SIZE:
        y = tl.permute(tl.reshape(y, (ROWS, SIZE // R, R)), (0, 2, 1))
    return tl.reshape(y, (ROWS, SIZE))


@triton.jit
def _hadamard_kernel(
    y_ptr, scale_ptr,
    x_ptr, signs_ptr, small_ptr,
    M, per,
    stride_xm,
    SCALE: tl.constexpr, TOP: tl.constexpr, TRANSPOSED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    SMALL: tl.constexpr, PADDED: tl.constexpr, RADICES: tl.constexpr, POWER: tl.constexpr,
):
    """Rotates ROWS rows of BLOCKS blocks; of x, `per` such rows lie behind one another, then stride_xm apart.

    scale_ptr: for the scales of int8 codes y; None where y is floats. Padding is 0 all the way.
    """
    SIZE: tl.constexpr = PADDED * POWER
    K: tl.constexpr = BLOCKS * SMALL * POWER
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_m = offs_m < M
    i = tl.arange(0, PADDED_BLOCKS * SIZE)
    block, small, inner = i // SIZE, i // POWER % PADDED, i % POWER
    offs_k = (block * SMALL + small) * POWER + inner
    mask_k = (block < BLOCKS) & (small < SMALL)
    mask = mask_m[:, None] & mask_k[None, :]
    starts = offs_m // per * stride_xm + offs_m % per * K
    v = tl.load(x_ptr + starts[:, None] + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if signs_ptr is not None:
        sign_ptrs = signs_ptr + (offs_m % per * K)[:, None] + offs_k[None, :]
        signs = tl.load(sign_ptrs, mask=mask, other=1).to(tl.float32)
        if not TRANSPOSED:
            v = v * signs
    for r in tl.static_range(len(RADICES)):  # from the last factor to the first
        v = _last_factor(v, _sylvester(RADICES[r]), ROWS * PADDED_BLOCKS, SIZE, PARTS if r == 0 else 2)
    if small_ptr is not None:
        j = tl.arange(0, PADDED)
        mask_j = (j < SMALL)[:, None] & (j < SMALL)[None, :]
        if TRANSPOSED:
            offs_j = j[None, :] * SMALL + j[:, None]
        else:
            offs_j = j[:, None] * SMALL + j[None, :]
        matrix = tl.load(small_ptr + offs_j, mask=mask_j, other=0.0)
        v = _last_factor(v, matrix, ROWS * PADDED_BLOCKS, SIZE, PARTS if len(RADICES) == 0 else 2)
    v = tl.reshape(v, (ROWS, PADDED_BLOCKS * SIZE)) * SCALE
    if signs_ptr is not None and TRANSPOSED:
        v = v * signs
    y_ptrs = y_ptr + (offs_m * K)[:, None] + offs_k[None, :]
    if scale_ptr is None:
        tl.store(y_ptrs, v.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        v = v.to(x_ptr.dtype.element_ty).to(tl.float32)
        low, high = reduce_range(v, mask, 1)
        scale, zero = qparams(low, high, -TOP, TOP, True, 0.0)
        tl.store(scale_ptr + offs_m, scale, mask=mask_m)
        codes = row_codes(v, inverse(scale, zero)[:, None], zero[:, None], TOP, tl.int8, False)
        tl.store(y_ptrs, codes, mask=mask)


_matrices: dict[tuple[int, torch.device], Tensor] = {}


def _small(m: int, x: Tensor) -> Tensor:
    """Returns the matrix of order m where x is."""
    if not is_eager(x):
        return hadamard_matrix(m).to(x.device)  # a constant of the graph
    key = m, x.device
    if key not in _matrices:
        _matrices[key] = hadamard_matrix(m).to(x.device)
    return lasting(_matrices[key])


def _launch(
    y: Tensor, scale: Tensor | None, rows: Tensor, signs: Tensor | None, n: int, tile: Tile, transposed: bool
) -> None:
    m, k = rows.shape
    per = k // (n * tile.blocks)
    small = _small(tile.small, rows) if tile.padded > 1 else None
    launch(
        _hadamard_kernel, (-(-m * per // tile.rows),), y, scale, rows, signs, small, m * per, per, rows.stride(0),
        SCALE=n**-0.5, TOP=float(LEVELS), TRANSPOSED=transposed, PARTS=2 if rows.dtype == torch.float32 else 1,
        ROWS=tile.rows, BLOCKS=tile.blocks, PADDED_BLOCKS=tile.padded_blocks, SMALL=tile.small, PADDED=tile.padded,
        RADICES=tile.radices[::-1], POWER=tile.power, num_warps=tile.warps,
    )


def hadamard_triton(x: Tensor, signs: Tensor | None, block: int, transposed: bool) -> Tensor:
    block = block or hadamard_block(int(x.shape[-1]))
    rows, tile = rows_of(x), choose_tile(block, 1)
    assert tile is not None
    y = fresh(x.new_empty(rows.shape))
    if rows.numel():
        _launch(y, None, rows, signs, block, tile, transposed)
    return y.view(x.shape)


def hadamard_quantize_rows_triton(x: Tensor, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    rows, k = rows_of(x), int(x.shape[-1])
    block = block or hadamard_block(k)
    tile = choose_tile(block, k // block)
    if tile is None:  # a program cannot hold a row: two passes
        codes, scale = quantize(hadamard_triton(rows, signs, block, False), torch.int8)
        return codes.view(x.shape), scale.view(x.shape[:-1])
    codes = fresh(x.new_empty(rows.shape, dtype=torch.int8))
    scale = fresh(x.new_empty(rows.shape[:1], dtype=torch.float32))
    if rows.numel():
        _launch(codes, scale, rows, signs, block, tile, False)
    return codes.view(x.shape), scale.view(x.shape[:-1])
