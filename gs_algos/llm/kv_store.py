"""Holds keys or values of one layer as codes and scales: by token, or as KIVI. Tensors are `[B, H, T, D]`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gs_algos.ptq.kv import RECENT, KVScheme
from gs_kernels import hadamard, kv_read, kv_write_, pack_codes, unpack_codes

ROOM = 128  # tokens that a cache grows by
KIVI_SCALE = torch.float16
KIVI_MOST = torch.finfo(KIVI_SCALE).max


class TokenStore:
    """Holds tokens with scales of their own; those of 4 bits rotated, and rotated back as they are read.

    Args:
        like: tensor of the first tokens, for sizes and device.
        room: tokens that there is memory for from the start, all 0.
    """

    def __init__(self, scheme: KVScheme, like: Tensor, room: int = 0) -> None:
        self.size, self.rotated = like.shape[-1], scheme.bits == 4
        dtype, width = (torch.int8, self.size) if scheme.bits == 8 else (torch.uint8, (self.size + 1) // 2)
        form = (*like.shape[:2], room)
        self.codes = like.new_zeros((*form, width), dtype=dtype)
        self.scale = like.new_zeros((*form, scheme.groups(self.size)), dtype=torch.float32)
        self.first = self.end = 0  # the tokens in use

    @property
    def tokens(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def append(self, x: Tensor) -> None:
        count = x.shape[2]
        if self.end + count > self.codes.shape[2]:
            self._map(lambda t: self._larger(t, count))
            self.first, self.end = 0, self.tokens
        if count:
            at = slice(self.end, self.end + count)
            kv_write_(self.codes[:, :, at], self.scale[:, :, at], self._rotated(x.float()))
            self.end += count

    def _larger(self, t: Tensor, count: int) -> Tensor:
        room = -(-(self.tokens + count) // ROOM) * ROOM
        larger = t.new_empty((*t.shape[:2], room, t.shape[3]))
        larger[:, :, : self.tokens] = t[:, :, self.first : self.end]
        return larger

    def write_at(self, x: Tensor, position: Tensor) -> None:
        """Writes tokens where a `[1]` tensor on the device says."""
        kv_write_(self.codes, self.scale, self._rotated(x.float()), position)

    def read(self, dtype: torch.dtype) -> Tensor:
        return self._read(slice(self.first, self.end), dtype)

    def read_all(self, dtype: torch.dtype) -> Tensor:
        """Reads all that there is memory for."""
        return self._read(slice(None), dtype)

    def _read(self, at: slice, dtype: torch.dtype) -> Tensor:
        y = kv_read(self.codes[:, :, at], self.scale[:, :, at], size=self.size, dtype=dtype)
        return hadamard(y, transposed=True) if self.rotated and y.numel() else y

    def _rotated(self, x: Tensor) -> Tensor:
        return hadamard(x) if self.rotated else x

    def settle(self) -> None:
        """Does nothing: tokens are codes as soon as they are there."""

    def crop(self, count: int) -> None:
        """Takes the last tokens out."""
        self.end = max(self.first, self.end - count)

    def keep_last(self, count: int) -> None:
        """Takes all but the last tokens out."""
        self.first = max(self.first, self.end - count)

    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Changes the rows of the batch."""
        self._map(take)

    def clear(self) -> None:
        self._map(Tensor.zero_)
        self.first = self.end = 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.codes, self.scale = change(self.codes), change(self.scale)


def kivi_codes(x: Tensor, group: int, axis: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds groups along an axis: codes 0 to `most` in its shape, scales and minima, `x ~ code * scale + minimum`.

    The scale is (max - min) / most; 1 where all of a group are equal.
    """
    parts = x.float().unflatten(axis, (-1, group))
    low, high = parts.amin(axis + 1), parts.amax(axis + 1)
    low = low.clamp(-KIVI_MOST, KIVI_MOST).to(KIVI_SCALE)
    scale = ((high - low.float()) / most).clamp(max=KIVI_MOST).to(KIVI_SCALE)
    scale = torch.where(scale > 0, scale, 1.0).to(KIVI_SCALE)
    steps = (parts - low.float().unsqueeze(axis + 1)) / scale.float().unsqueeze(axis + 1)
    return steps.round().clamp(0, most).to(torch.uint8).flatten(axis, axis + 1), scale, low


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs codes `[..., D]` to bytes `[..., W]`, W = ceil(D * bits / 8)."""
    if not codes.numel():
        return codes[..., : -(-codes.shape[-1] * bits // 8)]
    return pack_codes(codes.flatten(0, -2), bits).view(*codes.shape[:-1], -1)


def unpack_rows(codes: Tensor, bits: int, size: int) -> Tensor:
    """Returns the codes `[..., size]` of what `pack_rows` packed."""
    form = (*codes.shape[:-1], size)
    if not codes.numel():
        return codes.new_empty(form)
    rows = codes.flatten(0, -2)
    return unpack_codes(rows, bits, (len(rows), size)).view(form)


class KiviStore:
    """Holds the last tokens as floats, and those before as codes in whole groups.

    Args:
        like: tensor of the first tokens, for sizes, dtype and device.
        axis: 2, groups are tokens of a channel, as keys have them; 3, channels of a rotated token, as values.
    """

    def __init__(self, scheme: KVScheme, like: Tensor, axis: int) -> None:
        self.bits, self.group, self.axis, self.size = scheme.bits, scheme.group, axis, like.shape[-1]
        self.recent = like[:, :, :0]
        self.codes, self.scale, self.low = self._quantized(self.recent)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hadamard(x.float()) if self.axis == 3 and x.numel() else x
        codes, scale, low = kivi_codes(x, self.group, self.axis, (1 << self.bits) - 1)
        return pack_rows(codes, self.bits), scale, low

    @property
    def tokens(self) -> int:
        return self.codes.shape[2] + self.recent.shape[2]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes + self.recent.nbytes

    def append(self, x: Tensor) -> None:
        self.recent = torch.cat([self.recent, x], 2)

    def settle(self) -> None:
        """Rounds whole groups of tokens that are no longer among the last ones."""
        count = (self.recent.shape[2] - RECENT) // self.group * self.group
        if count > 0:
            parts = self._quantized(self.recent[:, :, :count])
            held = (self.codes, self.scale, self.low)
            self.codes, self.scale, self.low = (torch.cat(pair, 2) for pair in zip(held, parts, strict=True))
            self.recent = self.recent[:, :, count:].clone()

    def read(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self._read(dtype), self.recent.to(dtype)], 2)

    def _read(self, dtype: torch.dtype) -> Tensor:
        parts = unpack_rows(self.codes, self.bits, self.size).float().unflatten(self.axis, (-1, self.group))
        scale, low = (t.float().unsqueeze(self.axis + 1) for t in (self.scale, self.low))
        y = (parts * scale + low).flatten(self.axis, self.axis + 1).to(dtype)
        return hadamard(y, transposed=True) if self.axis == 3 and y.numel() else y

    def crop(self, count: int) -> None:
        """Takes the last tokens out; of a group that is cut, the others become floats."""
        left = max(0, self.tokens - count)
        if left < self.codes.shape[2]:
            whole = left // self.group * self.group
            self.recent = self._read(self.recent.dtype)[:, :, whole:left]
            per = self.group if self.axis == 2 else 1
            self.codes = self.codes[:, :, :whole]
            self.scale, self.low = self.scale[:, :, : whole // per], self.low[:, :, : whole // per]
        else:
            self.recent = self.recent[:, :, : left - self.codes.shape[2]]

    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Changes the rows of the batch."""
        self.codes, self.scale, self.low = take(self.codes), take(self.scale), take(self.low)
        self.recent = take(self.recent)


def stores(scheme: KVScheme, keys: Tensor, values: Tensor, who: str, room: int = 0) -> tuple[Store, Store]:
    """Makes what holds keys and values like these.

    Raises:
        ValueError: if the heads cannot be cut into groups.
    """
    if scheme.group:
        scheme.refuse_head(values.shape[-1], who)
        return KiviStore(scheme, keys, 2), KiviStore(scheme, values, 3)
    return TokenStore(scheme, keys, room), TokenStore(scheme, values, room)


Store = TokenStore | KiviStore
