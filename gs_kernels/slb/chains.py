"""The passes of SLB on the CPU, as chains for `gs_kernels.compiled`: logits `[O, L, R]`, numbers of weights `[O, R]`.

A pass names every level, so that a weight's logits and their exponentials live in vector registers. c is
log2(e) / temperature, v the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.slb.ref import TAU_MAX

MAGIC = 1.5 * 2.0**23 + 127  # here fp32 has no fraction left, and its last bits are 127, the exponent of 1.0


def exp2(t: Tensor) -> Tensor:
    """2 ** t for t <= 0, off by at most 1.5e-7 of it, 0 from -126.5 down; in a chain 2.5 times as fast as `torch.exp2`.

    A polynomial of the fraction; the whole part n goes into the exponent of a float by the bits of n + MAGIC.
    """
    t = t.clamp(min=-127.0)
    z = t + MAGIC
    f = t - (z - MAGIC)
    p = 1.535336188319500e-4 * f + 1.339887440266574e-3
    for coefficient in (9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0):
        p = p * f + coefficient
    return p * (z.view(torch.int32) << 23).view(torch.float32)


def mix_chain(a: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits `[O, L, R]` the largest, m; the sum of e = exp2((a - m) * c); and the sum of e * level."""
    planes = [p.float() for p in a.unbind(1)]
    if len(planes) == 1:
        planes = [torch.zeros_like(planes[0]), planes[0]]
    m = planes[0].clamp(min=-TAU_MAX)
    for p in planes[1:]:
        m = torch.maximum(m, p)
    s, acc = torch.zeros_like(m), torch.zeros_like(m)
    for k, p in enumerate(planes):
        e = exp2((p - m) * c)
        s, acc = s + e, acc + e * v[k]
    return m, s, acc


def more_chain(a: Tensor, v: Tensor, c: Tensor, m: Tensor, s: Tensor, acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of further levels."""
    top, more, weighted = mix_chain(a, v, c)
    largest = torch.maximum(m, top)
    old, new = exp2((m - largest) * c), exp2((top - largest) * c)
    return largest, s * old + more * new, acc * old + weighted * new


def weight_chain(w: Tensor, a: Tensor, v: Tensor, c: Tensor, scale: Tensor) -> None:
    _, s, acc = mix_chain(a, v, c)
    w.copy_(acc / s * scale)


def slope_chain(m: Tensor, w: Tensor, g: Tensor, dw: Tensor, a: Tensor, v: Tensor, c: Tensor, rate: Tensor) -> None:
    """Writes m, W_c and g, of which `gradient` makes the gradient of any logit; rate: scale / tau."""
    top, s, acc = mix_chain(a, v, c)
    m.copy_(top)
    w.copy_(acc / s)
    g.copy_(dw.float() * rate / s)


def gradient(a: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """dW * scale * P * (v - W_c) / tau. A single plane of logits is that of level 1."""
    v = v[-a.shape[1] :].view(1, -1, 1)
    return g.unsqueeze(1) * exp2((a.float() - m.unsqueeze(1)) * c) * (v - w.unsqueeze(1))


@cache
def at_once(chain: Callable[..., None], tensors: int) -> Callable[..., None]:
    """One of the chains below, which take so many tensors before v and c, with the pass that makes its m, w and g."""

    def whole(dw: Tensor, rate: Tensor, *args: Any) -> None:
        before, (v, c), after = args[:tensors], args[tensors : tensors + 2], args[tensors + 2 :]
        m, s, acc = mix_chain(before[0], v, c)
        chain(*before, v, c, m, acc / s, dw.float() * rate / s, *after)

    whole.__name__ = f"whole_{chain.__name__}"
    return whole


def gradient_chain(a: Tensor, da: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor) -> None:
    da.copy_(gradient(a, v, c, m, w, g))


def adamw_chain(
    a: Tensor, avg: Tensor, sq: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor
) -> None:
    """hyper: 1 - beta1, 1 - beta2, lr / correction1, sqrt(correction2), eps, 1 - lr * weight_decay."""
    da = gradient(a, v, c, m, w, g)
    avg_new = avg.float() * (1 - hyper[0]) + da * hyper[0]
    sq_new = sq.float() * (1 - hyper[1]) + da * da * hyper[1]
    a.copy_(a.float() * hyper[5] - hyper[2] * avg_new / (sq_new.sqrt() / hyper[3] + hyper[4]))
    avg.copy_(avg_new)
    sq.copy_(sq_new)


def sgd_chain(
    a: Tensor, buf: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor, nesterov: bool
) -> None:
    """hyper: lr, weight_decay, momentum."""
    da = gradient(a, v, c, m, w, g) + hyper[1] * a.float()
    buf_new = hyper[2] * buf.float() + da
    a.copy_(a.float() - hyper[0] * (da + hyper[2] * buf_new if nesterov else buf_new))
    buf.copy_(buf_new)


def plain_sgd_chain(a: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor) -> None:
    da = gradient(a, v, c, m, w, g) + hyper[1] * a.float()
    a.copy_(a.float() - hyper[0] * da)


def pick_chain(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit, where NaN counts as infinity; its code, uint8; and its level, NaN if a logit is."""
    planes = list(a.unbind(1))
    if len(planes) == 1:
        planes = [torch.zeros_like(planes[0]), planes[0]]
    nan = planes[0].isnan()
    best = torch.where(nan, torch.inf, planes[0])
    code = torch.zeros_like(best, dtype=torch.int32)
    level = v[0].expand(best.shape)
    for k, p in enumerate(planes[1:], 1):
        is_nan = p.isnan()
        nan = nan | is_nan
        p = torch.where(is_nan, torch.inf, p)
        better = p > best
        code = torch.where(better, k, code)
        level = torch.where(better, v[k], level)
        best = torch.maximum(best, p)
    return best, code.to(torch.uint8), torch.where(nan, torch.nan, level)
