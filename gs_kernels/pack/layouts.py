"""Says where the bits of a packed weight are: the one description of its bytes, on disk and in device memory.

A code is an unsigned field of 1, 2, 4 or 8 bits. Of a weight `[N, K]`:

- canonical (on disk): uint8 `[N, ceil(K * bits / 8)]`. Code k of a row is field `k % (8 / bits)`, low bits first, of
  byte `k // (8 / bits)`. Bits behind code K - 1 are 0.
- planar (what the kernels read): int16 `[ceil(K / 128), N, 8 * bits]`. A block of 128 codes of a row is `8 * bits`
  containers; field j, low bits first, of container e holds `k = 128 * block + j * 8 * bits + e`. So each field is a
  contiguous stripe of K, and a tile of rows is contiguous in memory. Codes behind K - 1 are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)
BLOCK_K = 128  # codes of a row that lie together in the planar layout
CANONICAL, PLANAR = "canonical", "planar"
LAYOUTS = (CANONICAL, PLANAR)


def codes_shape(layout: str, n: int, k: int, bits: int) -> tuple[int, ...]:
    """Returns the shape of the packed codes of a weight `[n, k]`."""
    if layout == PLANAR:
        return -(-k // BLOCK_K), n, 8 * bits
    return n, -(-k * bits // 8)


def codes_dtype(layout: str) -> torch.dtype:
    return torch.int16 if layout == PLANAR else torch.uint8


@dataclass(frozen=True)
class PackedWeight:
    """Holds a weight `[N, K]` as packed codes: `real = (code - zero) * scale`, or `levels[code] * scale`.

    With levels, scales may have 8 bits, and a divisor: `real = levels[code] * (scale / divisor)`, as 4-bit floats have
    it. Those of NVFP4 come with the divisor, not with its inverse, which would round once more.

    Args:
        codes: packed as `layout` says.
        scale: `[N, G]` fp32 / fp16 / bf16, or with levels float8_e8m0fnu (powers of two) or float8_e4m3fn; G = K /
            group_size groups along K.
        zero: `[N, G]` in a float dtype, which may have fractions, or one number for all: `2 ** (bits - 1)` for a
            symmetric grid, 0.5 for the two values ±scale / 2 of 1 bit, 1.5 for the four evenly spaced levels of SLB.
        levels: `[2 ** bits]` fp32 for a grid that is not evenly spaced (NF4); then zero is 0.
        bits: 1, 2, 4 or 8.
        shape: (N, K).
        group_size: elements of a row that share a scale; K for one scale per row.
        layout: `canonical` or `planar`.
        divisor: `[D]` fp32 for scales of float8_e4m3fn, else None: each is for N / D rows in turn.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | float
    levels: Tensor | None
    bits: int
    shape: tuple[int, int]
    group_size: int
    layout: str = CANONICAL
    divisor: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Counts the bytes of codes, scales, zero points, levels and divisors."""
        parts = (self.codes, self.scale, self.zero, self.levels, self.divisor)
        return sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))

    def to(self, device: torch.device | str) -> PackedWeight:
        """Copies the weight to another device."""
        zero = self.zero.to(device) if isinstance(self.zero, Tensor) else self.zero
        levels = None if self.levels is None else self.levels.to(device)
        divisor = None if self.divisor is None else self.divisor.to(device)
        moved = replace(self, zero=zero, levels=levels, divisor=divisor)
        return replace(moved, codes=self.codes.to(device), scale=self.scale.to(device))

    def real_scale(self) -> Tensor:
        """Returns the scales `[N, G]` fp32 as values are multiplied by them."""
        scale = self.scale.detach().float()
        if self.divisor is None:
            return scale
        return scale / self.divisor.detach().repeat_interleave(self.shape[0] // self.divisor.shape[0]).unsqueeze(1)
