"""Writes and reads quantized keys and values of attention: implementations, registration, the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import FLOATS
from gs_kernels.kv_cache.ref import LIMITS, kv_codes_ref, kv_read_ref
from gs_kernels.runtime.dispatch import implementations, triton_refuses
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager


def _write_ref(codes: Tensor, scale: Tensor, x: Tensor, position: Tensor | None) -> None:
    at = torch.arange(x.shape[2], device=x.device)
    at = at if position is None else at + position
    for held, new in zip((codes, scale), kv_codes_ref(x, scale.shape[-1], codes.dtype), strict=True):
        held.index_copy_(2, at, new)


def _read_ref(codes: Tensor, scale: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return kv_read_ref(codes, scale, size=size, dtype=dtype).contiguous()


def _read_fake(codes: Tensor, scale: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:3], size), dtype=dtype)


def _nothing(*_: object) -> None:
    return None


def _refuses(*args: object) -> list[str]:
    """Says why the Triton kernels cannot run a call: they read rows, whose elements are side by side."""
    tensors = [a for a in args[:3] if isinstance(a, Tensor)]
    reasons = triton_refuses(tensors[0])
    far = [t.stride() for t in tensors if t.shape[-1] > 1 and t.stride(-1) != 1]
    return [*reasons, *(f"needs elements of a token side by side, got strides {strides}" for strides in far[:1])]


WRITE = implementations("kv_write_", _write_ref, refuses=_refuses)
READ = implementations("kv_read", _read_ref, refuses=_refuses)
_write = register(
    "kv_write_(Tensor(a!) codes, Tensor(b!) scale, Tensor x, Tensor? position) -> ()",
    WRITE,
    _nothing,
)
_read = register("kv_read(Tensor codes, Tensor scale, int size, ScalarType dtype) -> Tensor", READ, _read_fake)


def kv_write_(codes: Tensor, scale: Tensor, x: Tensor, position: Tensor | None = None) -> None:
    """Writes tokens into a quantized cache: a scale of each group, `codes = clamp(round(x / scale), qmin, qmax)`.

    For int8 codes -127..127 the scale is `max |x| / 127`. For codes of 4 bits, -8..7, it is `-e / 8`, e the element
    that is largest in size, of either sign: all 16 levels are used. The extremes are those of the call: nothing is
    calibrated.

    Args:
        codes: `[B, H, C, W]` of C tokens, any strides with the last one 1: int8, W = D; or uint8, which holds two codes
            of 4 bits, W = ceil(D / 2): byte j has element j in its lower half, element j + W in its upper half, each 8
            above its value.
        scale: `[B, H, C, G]` fp32, strides as those of codes: a token has G groups of D / G elements, each with a
            scale; 1 for a group of zeros.
        x: `[B, H, T, D]` fp32 / fp16 / bf16: T tokens.
        position: `[1]` int64, where the first of them goes, on the device of x; None: to the start. Beyond the end of
            the cache nothing is written on a GPU, and a CPU raises.

    Raises:
        TypeError, ValueError: if dtypes, shapes or devices do not fit.
    """
    who = "kv_write_"
    _check_cache(who, codes, scale, x.shape[-1] if isinstance(x, Tensor) and x.dim() == 4 else 0)
    if x.dtype not in FLOATS:
        raise TypeError(f"{who}: x must be a float32 / float16 / bfloat16 tensor, got {x.dtype}")
    if x.shape[:2] != codes.shape[:2] or x.shape[2] > codes.shape[2] or x.shape[2] == 0:
        raise ValueError(
            f"{who}: x must be [{codes.shape[0]}, {codes.shape[1]}, 1..{codes.shape[2]}, D], got {list(x.shape)}"
        )
    if position is not None and (position.dtype != torch.int64 or position.numel() != 1):
        raise ValueError(
            f"{who}: position must be one int64, got {list(position.shape)} of {position.dtype}; use tensor([n])"
        )
    for name, t in (("x", x), ("position", position)):
        if t is not None and t.device != codes.device:
            raise ValueError(f"{who}: {name} must be on {codes.device}, where codes are, got {t.device}")
    with torch.no_grad():
        _write(codes, scale, x.detach(), position)
    if is_eager(codes, scale):
        torch.autograd.graph.increment_version((codes, scale))


def kv_read(codes: Tensor, scale: Tensor, *, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reads tokens of a quantized cache: `codes * scale`. No gradient.

    Args:
        codes: `[B, H, T, W]` as of `kv_write_`, or a part of the cache along T.
        scale: `[B, H, T, G]`.
        size: D, elements of a token.
        dtype: fp32 / fp16 / bf16.

    Returns:
        `[B, H, T, size]` of dtype, contiguous.

    Raises:
        TypeError, ValueError: if dtypes, shapes or devices do not fit.
    """
    _check_cache("kv_read", codes, scale, size)
    if dtype not in FLOATS:
        raise TypeError(f"kv_read: dtype must be float32, float16 or bfloat16, got {dtype}")
    return _read(codes, scale, size, dtype)  # type: ignore[no-any-return]


def _check_cache(who: str, codes: Tensor, scale: Tensor, size: int) -> None:
    for name, t, dtypes in (("codes", codes, tuple(LIMITS)), ("scale", scale, (torch.float32,))):
        if not isinstance(t, Tensor) or t.dtype not in dtypes:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{who}: {name} must be a tensor of {kinds}, got {getattr(t, 'dtype', t)!s:.60}")
    if codes.dim() != 4 or scale.dim() != 4 or codes.shape[:3] != scale.shape[:3]:
        raise ValueError(
            f"{who}: codes and scale must be [B, H, C, W] and [B, H, C, G], got {list(codes.shape)} and "
            f"{list(scale.shape)}"
        )
    width = size if codes.dtype == torch.int8 else (size + 1) // 2
    if size < 1 or codes.shape[-1] != width:
        raise ValueError(f"{who}: codes must have {width} in a row, for {size} elements, got {codes.shape[-1]}")
    if scale.shape[-1] < 1 or size % scale.shape[-1]:
        raise ValueError(f"{who}: groups must divide {size} elements, got {scale.shape[-1]} scales")
    if scale.device != codes.device:
        raise ValueError(f"{who}: scale must be on {codes.device}, where codes are, got {scale.device}")
