"""Computes SLB's weights, gradients, codes and optimizer steps on a GPU, reading the logits once.

A program holds a tile of T = BLOCK_N * BLOCK_K weights, and their logits as `[BLOCK_L, T]`. One thread has all levels
of a weight: sums over levels need no exchange, and the softmax stays in registers. More than BLOCK_L levels are read
in chunks, by an online softmax.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import CANONICAL, codes_shape
from gs_kernels.runtime.dispatch import launch
from gs_kernels.slb.memory_format import empty_weight, filter_size, readable
from gs_kernels.slb.tiles import UPDATE_CHUNK, Tile, choose_tile

LOG2E = tl.constexpr(1.4426950408889634)
TAU_MIN = tl.constexpr(2.0**-100)
TAU_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _weights_of(N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns row, column and mask of the weights of this program, `[T]` each."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(K, BLOCK_K)
    offs = tl.arange(0, BLOCK_N * BLOCK_K)
    offs_n = (pid // tiles).to(tl.int64) * BLOCK_N + offs // BLOCK_K
    first = pid % tiles * BLOCK_K
    offs_k = offs % BLOCK_K
    return offs_n, first + offs_k, (offs_n < N) & (offs_k < K - first)


@triton.jit
def _weight_offsets(offs_n, offs_k, K, HW: tl.constexpr):
    """Returns where weights lie in memory: channels last if HW > 1, else in rows like their logits."""
    if HW > 1:
        offs_k = offs_k % HW * (K // HW) + offs_k // HW
    return offs_n * K + offs_k


@triton.jit
def _inverse_temperature(tau_ptr):
    """Computes 1 / tau; NaN if tau is out of range."""
    tau = tl.load(tau_ptr)
    return tl.where((tau >= TAU_MIN) & (tau <= TAU_MAX), tl.div_rn(1.0, tau), float("nan"))


@triton.jit
def _logit_offsets(offs, K, start, BLOCK_L: tl.constexpr):
    """Returns where the logits of BLOCK_L levels lie, `[BLOCK_L, T]`, from where those of level 0 do."""
    offs_l = start + tl.arange(0, BLOCK_L)
    return (offs_l.to(tl.int64) * K)[:, None] + offs[None, :]


@triton.jit
def _logit_mask(mask, start, PLANES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Returns the mask of logits, `[BLOCK_L, T]` or `[1, T]`, from that of weights."""
    mask = mask[None, :]
    if PLANES % BLOCK_L != 0:
        mask = mask & (start + tl.arange(0, BLOCK_L) < PLANES)[:, None]
    return mask


@triton.jit
def _logits(a_ptr, offs, mask, K, start, PLANES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Loads the logits of BLOCK_L levels, `[BLOCK_L, T]` fp32; -inf past the last level."""
    real = _logit_mask(mask, start, PLANES, BLOCK_L)
    a = tl.load(a_ptr + _logit_offsets(offs, K, start, BLOCK_L), mask=real, other=0.0).to(tl.float32)
    if PLANES % BLOCK_L != 0:
        a = tl.where((start + tl.arange(0, BLOCK_L) < PLANES)[:, None], a, float("-inf"))
    return a


@triton.jit
def _levels(v_ptr, start, PLANES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Loads the values of BLOCK_L levels, `[BLOCK_L, 1]`; a single plane of logits belongs to level 1."""
    offs_l = start + tl.arange(0, BLOCK_L)
    if PLANES == 1:
        v = tl.load(v_ptr + 1 + offs_l)
    else:
        v = tl.load(v_ptr + offs_l, mask=offs_l < PLANES, other=0.0)
    return v[:, None]


@triton.jit
def _inverse_sum(s):
    """Computes 1 / s for 1 <= s <= 256, in half the instructions of a division; exact for powers of two."""
    r = tl.rsqrt(s)
    r = r * r
    return tl.fma(r, tl.fma(-s, r, 1.0), r)  # a step of Newton's


@triton.jit
def _mix(a_ptr, v_ptr, offs, mask, K, c, PLANES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Computes the softmax over levels and the weights W_c, the levels' mean under it.

    Returns (m, r, W_c, a, e): the largest logit, 1 / the sum of e, the sum of e * level * r, each `[T]`; the logits and
    e = exp2((a - m) * c), `[BLOCK_L, T]`, of all levels if BLOCK_L holds them, else of the last chunk.
    """
    a = _logits(a_ptr, offs, mask, K, 0, PLANES, BLOCK_L)
    m = tl.maximum(tl.max(a, 0), 0.0 if PLANES == 1 else -TAU_MAX)
    e = tl.exp2((a - m[None, :]) * c)
    s = tl.sum(e, 0)
    acc = tl.sum(e * _levels(v_ptr, 0, PLANES, BLOCK_L), 0)
    if PLANES == 1:
        zero = tl.exp2(-m * c)
        s += zero
        acc += zero * tl.load(v_ptr)
    if PLANES > BLOCK_L:
        for start in range(BLOCK_L, PLANES, BLOCK_L):
            a = _logits(a_ptr, offs, mask, K, start, PLANES, BLOCK_L)
            top = tl.maximum(m, tl.max(a, 0))
            e = tl.exp2((a - top[None, :]) * c)
            old = tl.exp2((m - top) * c)
            s = s * old + tl.sum(e, 0)
            acc = acc * old + tl.sum(e * _levels(v_ptr, start, PLANES, BLOCK_L), 0)
            m = top
    r = _inverse_sum(s)
    return m, r, acc * r, a, e


@triton.jit
def _argmax(a_ptr, offs, mask, K, PLANES: tl.constexpr, BLOCK_L: tl.constexpr):
    """Finds the level of the largest logit, the lowest of equals, and whether a logit is NaN, which counts as +inf."""
    best = tl.full(offs.shape, 0.0 if PLANES == 1 else float("-inf"), tl.float32)
    code = tl.zeros(offs.shape, tl.int32)
    nan = tl.zeros(offs.shape, tl.int32)
    for start in range(0, PLANES, BLOCK_L):
        a = _logits(a_ptr, offs, mask, K, start, PLANES, BLOCK_L)
        nan = tl.maximum(nan, tl.max((a != a).to(tl.int32), 0))
        a = tl.where(a == a, a, float("inf"))
        top = tl.max(a, 0)
        number = (1 if PLANES == 1 else start) + tl.arange(0, BLOCK_L)[:, None]
        first = tl.min(tl.where(a == top[None, :], number, 256), 0)
        code = tl.where(top > best, first, code)
        best = tl.maximum(best, top)
    return code, nan > 0


@triton.jit
def _row_scale(scale_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads the scale of each row once, and returns that of each weight, `[T]`."""
    offs_n = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
    return tl.reshape(tl.broadcast_to(scale[:, None], [BLOCK_N, BLOCK_K]), [BLOCK_N * BLOCK_K])


@triton.jit
def _slb_weight_kernel(
    w_ptr,
    a_ptr, v_ptr, tau_ptr, scale_ptr,
    N, K,
    HW: tl.constexpr, HARD: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    offs_n, offs_k, mask = _weights_of(N, K, BLOCK_N, BLOCK_K)
    offs = offs_n * (PLANES * K) + offs_k
    if HARD:
        code, nan = _argmax(a_ptr, offs, mask, K, PLANES, BLOCK_L)
        w = tl.where(nan, float("nan"), tl.load(v_ptr + code))
    else:
        _, _, w, _, _ = _mix(a_ptr, v_ptr, offs, mask, K, _inverse_temperature(tau_ptr) * LOG2E, PLANES, BLOCK_L)
    if scale_ptr is not None:
        w *= _row_scale(scale_ptr, N, K, BLOCK_N, BLOCK_K)
    tl.store(w_ptr + _weight_offsets(offs_n, offs_k, K, HW), w.to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _slb_weight_bwd_kernel(
    da_ptr, dscale_ptr,
    dw_ptr, a_ptr, v_ptr, tau_ptr, scale_ptr,
    N, K,
    HW: tl.constexpr, HARD: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Computes da and dscale; a pointer that is None is not wanted. dscale: row sums of each tile, `[N, tiles]`."""
    offs_n, offs_k, mask = _weights_of(N, K, BLOCK_N, BLOCK_K)
    offs = offs_n * (PLANES * K) + offs_k
    g = tl.load(dw_ptr + _weight_offsets(offs_n, offs_k, K, HW), mask=mask, other=0.0).to(tl.float32)
    if HARD:
        code, nan = _argmax(a_ptr, offs, mask, K, PLANES, BLOCK_L)
        w = tl.where(nan, float("nan"), tl.load(v_ptr + code))
    else:
        inv = _inverse_temperature(tau_ptr)
        c = inv * LOG2E
        m, r, w, a, e = _mix(a_ptr, v_ptr, offs, mask, K, c, PLANES, BLOCK_L)
    if dscale_ptr is not None:
        sums = tl.sum(tl.reshape(g * w, [BLOCK_N, BLOCK_K]), 1)
        tiles = tl.cdiv(K, BLOCK_K)
        rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(dscale_ptr + rows * tiles + tl.program_id(0) % tiles, sums, mask=rows < N)
    if da_ptr is not None:
        if scale_ptr is not None:
            g *= _row_scale(scale_ptr, N, K, BLOCK_N, BLOCK_K)
        g = g * inv * r
        for start in range(0, PLANES, BLOCK_L):
            if PLANES > BLOCK_L:
                a = _logits(a_ptr, offs, mask, K, start, PLANES, BLOCK_L)
                e = tl.exp2((a - m[None, :]) * c)
            da = g[None, :] * e * (_levels(v_ptr, start, PLANES, BLOCK_L) - w[None, :])
            real = _logit_mask(mask, start, PLANES, BLOCK_L)
            tl.store(da_ptr + _logit_offsets(offs, K, start, BLOCK_L), da.to(da_ptr.dtype.element_ty), mask=real)


@triton.jit
def _slb_pack_kernel(
    bytes_ptr,
    a_ptr,
    N, K,
    BITS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Packs the codes of the largest logits, in the canonical layout of gs_kernels/pack/layouts.py."""
    offs_n, offs_k, mask = _weights_of(N, K, BLOCK_N, BLOCK_K)
    code, _ = _argmax(a_ptr, offs_n * (PLANES * K) + offs_k, mask, K, PLANES, BLOCK_L)
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.reshape(tl.where(mask, code, 0), [BLOCK_N * BLOCK_K // FIELDS, FIELDS])
    packed = tl.sum(fields << (tl.arange(0, FIELDS) * BITS)[None, :], 1)
    offs_n, offs_k, mask = _weights_of(N, tl.cdiv(K, FIELDS), BLOCK_N, BLOCK_K // FIELDS)
    tl.store(bytes_ptr + offs_n * tl.cdiv(K, FIELDS) + offs_k, packed.to(tl.uint8), mask=mask)


@triton.jit
def _gradient_factor(
    dw_ptr, a_ptr, v_ptr, tau_ptr, scale_ptr,
    offs_n, offs_k, mask,
    N, K,
    HW: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Computes what an optimizer needs for a logit's gradient, g * e * (level - W_c): g = dW * scale * r / tau.

    Returns (g, m, W_c, c, a, e); all but g are those of `_mix`.
    """
    g = tl.load(dw_ptr + _weight_offsets(offs_n, offs_k, K, HW), mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        g *= _row_scale(scale_ptr, N, K, BLOCK_N, BLOCK_K)
    inv = _inverse_temperature(tau_ptr)
    m, r, w, a, e = _mix(a_ptr, v_ptr, offs_n * (PLANES * K) + offs_k, mask, K, inv * LOG2E, PLANES, BLOCK_L)
    return g * inv * r, m, w, inv * LOG2E, a, e


@triton.jit
def _one_minus_exp(x):
    """Computes 1 - exp(x) for x <= 0, without cancellation near 0."""
    series = 1.0 + x / 8
    for i in tl.static_range(7, 1, -1):
        series = 1.0 + x / i * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _slb_adamw_kernel(
    a_ptr, avg_ptr, sq_ptr,
    dw_ptr, v_ptr, tau_ptr, scale_ptr, step_ptr, lr_ptr, frozen_ptr,
    lr, decay, eps, ln_beta1, ln_beta2,
    N, K,
    HW: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    if frozen_ptr is not None:
        N = tl.where(tl.load(frozen_ptr) == 0, N, 0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    offs_n, offs_k, mask = _weights_of(N, K, BLOCK_N, BLOCK_K)
    offs = offs_n * (PLANES * K) + offs_k
    g, m, w, c, a, e = _gradient_factor(
        dw_ptr, a_ptr, v_ptr, tau_ptr, scale_ptr, offs_n, offs_k, mask, N, K, HW, PLANES, BLOCK_MIX, BLOCK_N, BLOCK_K
    )
    step = tl.load(step_ptr)
    keep1, keep2 = _one_minus_exp(ln_beta1), _one_minus_exp(ln_beta2)
    rate = lr / _one_minus_exp(step * ln_beta1)
    spread = tl.sqrt(_one_minus_exp(step * ln_beta2))
    for start in range(0, PLANES, BLOCK_L):
        at = _logit_offsets(offs, K, start, BLOCK_L)
        real = _logit_mask(mask, start, PLANES, BLOCK_L)
        if PLANES > BLOCK_L:
            al = _logits(a_ptr, offs, mask, K, start, PLANES, BLOCK_L)
            el = tl.exp2((al - m[None, :]) * c)
        else:
            al, el = a, e
        da = g[None, :] * el * (_levels(v_ptr, start, PLANES, BLOCK_L) - w[None, :])
        avg = tl.load(avg_ptr + at, mask=real, other=0.0).to(tl.float32)
        sq = tl.load(sq_ptr + at, mask=real, other=0.0).to(tl.float32)
        avg = avg * (1 - keep1) + da * keep1
        sq = sq * (1 - keep2) + da * da * keep2
        new = al * (1 - lr * decay) - rate * avg / (tl.sqrt(sq) / spread + eps)
        tl.store(avg_ptr + at, avg.to(avg_ptr.dtype.element_ty), mask=real)
        tl.store(sq_ptr + at, sq.to(sq_ptr.dtype.element_ty), mask=real)
        tl.store(a_ptr + at, new.to(a_ptr.dtype.element_ty), mask=real)


@triton.jit
def _slb_sgd_kernel(
    a_ptr, buf_ptr,
    dw_ptr, v_ptr, tau_ptr, scale_ptr, lr_ptr, frozen_ptr,
    lr, decay, momentum,
    N, K,
    HW: tl.constexpr, NESTEROV: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    if frozen_ptr is not None:
        N = tl.where(tl.load(frozen_ptr) == 0, N, 0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    offs_n, offs_k, mask = _weights_of(N, K, BLOCK_N, BLOCK_K)
    offs = offs_n * (PLANES * K) + offs_k
    g, m, w, c, a, e = _gradient_factor(
        dw_ptr, a_ptr, v_ptr, tau_ptr, scale_ptr, offs_n, offs_k, mask, N, K, HW, PLANES, BLOCK_MIX, BLOCK_N, BLOCK_K
    )
    for start in range(0, PLANES, BLOCK_L):
        at = _logit_offsets(offs, K, start, BLOCK_L)
        real = _logit_mask(mask, start, PLANES, BLOCK_L)
        if PLANES > BLOCK_L:
            al = _logits(a_ptr, offs, mask, K, start, PLANES, BLOCK_L)
            el = tl.exp2((al - m[None, :]) * c)
        else:
            al, el = a, e
        da = g[None, :] * el * (_levels(v_ptr, start, PLANES, BLOCK_L) - w[None, :]) + decay * al
        if buf_ptr is not None:
            buf = momentum * tl.load(buf_ptr + at, mask=real, other=0.0).to(tl.float32) + da
            tl.store(buf_ptr + at, buf.to(buf_ptr.dtype.element_ty), mask=real)
            da = da + momentum * buf if NESTEROV else buf
        tl.store(a_ptr + at, (al - lr * da).to(a_ptr.dtype.element_ty), mask=real)


def _sizes(logits: Tensor) -> tuple[int, int, int]:
    o, planes = logits.shape[0], logits.shape[1]
    return o, int(planes), math.prod(logits.shape[2:])


def _cut(logits: Tensor, **wanted: int) -> tuple[tuple[int, int], Tile, dict[str, int]]:
    """Returns (N, K), the tile, and the constants that every kernel takes."""
    o, planes, r = _sizes(logits)
    tile = choose_tile(o, r, planes, logits.element_size(), **wanted)
    flags = {
        "PLANES": planes, "BLOCK_L": tile.levels,
        "BLOCK_N": tile.rows, "BLOCK_K": tile.cols, "num_warps": tile.warps,
    }
    return (o, r), tile, flags


def slb_weight_triton(
    logits: Tensor, levels: Tensor, temperature: Tensor, scale: Tensor | None,
    shape: list[int], hard: bool, channels_last: bool, dtype: torch.dtype,
) -> Tensor:
    logits = logits.contiguous()
    w = empty_weight(logits, shape, dtype, channels_last)
    sizes, tile, flags = _cut(logits)
    launch(
        _slb_weight_kernel, tile.grid(*sizes), w, logits, levels, temperature, scale, *sizes,
        HW=int(filter_size(shape, channels_last)), HARD=hard, **flags,
    )
    return w


def slb_weight_backward_triton(
    dw: Tensor, logits: Tensor, levels: Tensor, temperature: Tensor, scale: Tensor | None,
    hard: bool, for_logits: bool, for_scale: bool,
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    dw, hw = readable(dw)
    sizes, tile, flags = _cut(logits)
    o, r = sizes
    da = torch.empty_like(logits) if for_logits else logits.new_empty(0)
    sums = levels.new_empty((o, -(-r // tile.cols)) if for_scale else 0)
    launch(
        _slb_weight_bwd_kernel, tile.grid(*sizes),
        da if for_logits else None, sums if for_scale else None, dw, logits, levels, temperature, scale, *sizes,
        HW=int(hw), HARD=hard, **flags,
    )
    # one order whatever the GPU does, so deterministic
    return da, sums.sum(1) if for_scale else sums


def slb_pack_triton(logits: Tensor, bits: int) -> Tensor:
    logits = logits.contiguous()
    sizes, tile, flags = _cut(logits, columns_min=8)
    packed = torch.empty(codes_shape(CANONICAL, *sizes, bits), dtype=torch.uint8, device=logits.device)
    launch(_slb_pack_kernel, tile.grid(*sizes), packed, logits, *sizes, BITS=bits, **flags)
    return packed


def slb_adamw__triton(
    logits: Tensor, dw: Tensor, levels: Tensor, temperature: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    step: Tensor, scale: Tensor | None, lr_tensor: Tensor | None, frozen: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:
    dw, hw = readable(dw)
    sizes, tile, flags = _cut(logits, vectors_max=1)
    launch(
        _slb_adamw_kernel, tile.grid(*sizes), logits, exp_avg, exp_avg_sq,
        dw, levels, temperature, scale, step, lr_tensor, frozen,
        float(lr), float(weight_decay), float(eps), _ln(beta1), _ln(beta2), *sizes,
        HW=int(hw), BLOCK_MIX=tile.levels, **flags | {"BLOCK_L": min(tile.levels, UPDATE_CHUNK)},
    )


def slb_sgd__triton(
    logits: Tensor, dw: Tensor, levels: Tensor, temperature: Tensor, momentum_buffer: Tensor | None,
    scale: Tensor | None, lr_tensor: Tensor | None, frozen: Tensor | None,
    lr: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:
    dw, hw = readable(dw)
    sizes, tile, flags = _cut(logits, vectors_max=1)
    launch(
        _slb_sgd_kernel, tile.grid(*sizes), logits, momentum_buffer,
        dw, levels, temperature, scale, lr_tensor, frozen,
        float(lr), float(weight_decay), float(momentum), *sizes,
        HW=int(hw), NESTEROV=nesterov, BLOCK_MIX=tile.levels, **flags | {"BLOCK_L": min(tile.levels, UPDATE_CHUNK)},
    )


def _ln(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
