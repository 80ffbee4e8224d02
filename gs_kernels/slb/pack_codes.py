"""Turns logits into the codes of the levels they choose: implementations, registration, the public functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gs_kernels.pack.layouts import BITS, CANONICAL, codes_shape
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.slb.checks import check_logits
from gs_kernels.slb.cpu import slb_pack_cpu
from gs_kernels.slb.ref import slb_pack_ref


def _pack_ref(logits: Tensor, bits: int) -> Tensor:
    return slb_pack_ref(logits, bits=bits)


def _pack_fake(logits: Tensor, bits: int) -> Tensor:
    size = codes_shape(CANONICAL, logits.shape[0], math.prod(logits.shape[2:]), bits)
    return logits.new_empty(size, dtype=torch.uint8)


PACK = implementations("slb_pack", _pack_ref, slb_pack_cpu)
_run = register("slb_pack(Tensor logits, int bits) -> Tensor", PACK, _pack_fake)


def slb_pack(logits: Tensor, *, bits: int | None = None) -> Tensor:
    """Packs the levels of the largest logits as codes in the canonical layout of `PackedWeight`. No gradient.

    The codes go from logits to bytes without a tensor in between. Equal logits choose the lowest level; NaN counts as
    infinity.

    Args:
        logits: `[O, L, ...]` as for `slb_weight`. K, the codes of a row, are the other axes flattened.
        bits: of a code: 1, 2, 4 or 8; default: the fewest that hold L levels.

    Returns:
        uint8 `[O, ceil(K * bits / 8)]`, low bits first.

    Raises:
        ValueError: if bits cannot hold L levels, or logits are empty or have more than 256.
        TypeError: if logits are not fp32 / fp16 / bf16.
    """
    count = check_logits("slb_pack", logits)
    fewest = next(b for b in BITS if 2**b >= count)
    if bits is not None and (bits not in BITS or bits < fewest):
        raise ValueError(
            f"slb_pack: bits must be one of {', '.join(map(str, BITS))} and hold {count} levels, got bits={bits};"
            f" use bits={fewest}"
        )
    return _run(logits.detach(), bits or fewest)


def slb_codes(logits: Tensor) -> Tensor:
    """Returns the level of the largest logit of each weight: `argmax(logits, 1)`. No gradient.

    Equal logits choose the lowest level, on every device; NaN counts as infinity.

    Args:
        logits: `[O, L, ...]` as for `slb_weight`.

    Returns:
        uint8 `[O, ...]`, contiguous.

    Raises:
        ValueError, TypeError: as `slb_pack`.
    """
    check_logits("slb_codes", logits)
    codes = _run(logits.detach(), 8)
    return codes.view(logits.shape[0], *logits.shape[2:])
