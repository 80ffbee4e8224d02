"""Calls `cpu.cpp`: all layers of a Llama, Mistral or Qwen for one token, in one call. What Python and small operations
cost is most of a small model's time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, pack_weight
from gs_kernels.qmatmul.cpu import interleaved_product
from gs_kernels.qmatmul.cpu.interleaved import LANES, interleaved

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

_size, _pointer = ctypes.c_int64, ctypes.c_void_p
FUNCTIONS = {"decoder_step": (*(_pointer,) * 4, _size, _pointer, ctypes.c_int)}


class _Linear(ctypes.Structure):
    _fields_ = [("product", _pointer), ("bias", _pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("norm_before", "norm_between", "norm_q", "norm_k")),
        *((name, _Linear) for name in LINEARS),
        *(("keys", _pointer), ("values", _pointer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *(("layers", _pointer), ("norm", _pointer)),
        *((name, _size) for name in ("count", "hidden", "inner", "heads", "kv_heads", "head_dim", "length")),
        *((name, ctypes.c_float) for name in ("eps", "eps_last", "scaling")),
        ("bf16", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class DecoderLayer:
    """Holds what one layer is computed with.

    Args:
        norm_before, norm_between: `[hidden]`: in front of the attention, and of the gated units.
        linears: the seven of `LINEARS`: a packed weight, and a bias `[N]` or None.
        keys, values: `[1, kv_heads, length, head_dim]` fp32 or bf16, contiguous, head_dim a multiple of 16: those of a
            token are written at its position.
        norm_q, norm_k: `[head_dim]`, of each head of the queries and keys before they are turned; None for none.
    """

    norm_before: Tensor
    norm_between: Tensor
    linears: Sequence[tuple[PackedWeight, Tensor | None]]
    keys: Tensor
    values: Tensor
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None


def decoder_step_of(
    layers: Sequence[DecoderLayer], norm: Tensor, eps: tuple[float, float], functions: Any = None
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Returns the function of x `[1, 1, hidden]` of a token, cos and sin `[1, 1, head_dim]` of its position, and that.

    The function returns the last norm of what the layers make of x: each adds `attention(norm(x))`, then
    `down(silu(gate(norm(x))) * up(norm(x)))`, its norm `x / sqrt(mean(x**2) + eps) * weight`. Norms of
    the heads' queries and keys have the eps of the layers. All is computed in fp32; norms and biases in other dtypes
    are copied, the result has the dtype of x. Where the last norm has 16 bits, packed weights are multiplied as with
    x of 16 bits (row_pieces.h).

    Args:
        norm: `[hidden]`.
        eps: of the layers' norms, and of the last.
        functions: default `kernels()`.

    Raises:
        UnsuitableError: if there is no C++ here, sizes do not fit, or a weight has levels or tensors of inference mode.
    """
    functions = kernels() if functions is None else functions
    if functions is None:
        raise UnsuitableError("decoder_step/cpu.cpp does not run")  # the log says why
    x_short, norm = norm.dtype != torch.float32, _in_fp32(norm)
    held: list[Any] = [layers, norm]
    made = (_Layer * len(layers))(*(_layer_of(layer, x_short, held) for layer in layers))
    (hidden,), (_, kv_heads, length, head_dim) = norm.shape, layers[0].keys.shape
    heads, inner = layers[0].linears[0][0].shape[0] // head_dim, layers[0].linears[4][0].shape[0]
    width, kv_width = heads * head_dim, kv_heads * head_dim
    expected = [(width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, width), (inner, hidden)]
    expected += [(inner, hidden), (hidden, inner)]
    for layer in layers:
        shapes = [weight.shape for weight, _ in layer.linears]
        same = layer.keys.shape == layer.values.shape == (1, kv_heads, length, head_dim)
        same &= all(norm is None or norm.shape == (head_dim,) for norm in (layer.norm_q, layer.norm_k))
        if shapes != expected or not same or heads % kv_heads or head_dim % LANES:
            raise UnsuitableError(f"the shapes of a layer do not fit together, or to the first layer: {shapes}")
    sizes = (len(layers), hidden, inner, heads, kv_heads, head_dim, length)
    step = _Step(
        ctypes.addressof(made),
        norm.data_ptr(),
        *sizes,
        *eps,
        1 / math.sqrt(head_dim),
        layers[0].keys.dtype == torch.bfloat16,
    )
    held += [made, step]
    run, at = functions.decoder_step, ctypes.addressof(step)

    def compute(x: Tensor, cos: Tensor, sin: Tensor, position: int, held: object = held) -> Tensor:
        if not 0 <= position < length:
            raise ValueError(f"decoder_step: position must be in 0..{length - 1}, got {position}")
        moving, cos, sin = x.to(torch.float32, copy=True).contiguous(), _in_fp32(cos), _in_fp32(sin)
        y = torch.empty_like(moving)
        threads = torch.get_num_threads()
        run(at, moving.data_ptr(), cos.data_ptr(), sin.data_ptr(), position, y.data_ptr(), threads)
        return y.to(x.dtype)

    return compute


def _layer_of(layer: DecoderLayer, x_short: bool, held: list[Any]) -> _Layer:
    linears = []
    for weight, bias in layer.linears:
        if weight.levels is not None:
            raise UnsuitableError("a weight has a table of levels")
        form = interleaved(weight)
        product = interleaved_product.fixed_product(form, torch.float32, torch.float32, torch.float32, x_short)
        offset = None if bias is None else _in_fp32(bias)
        held += [form, product, offset]
        linears.append(_Linear(ctypes.addressof(product), None if offset is None else offset.data_ptr()))
    given = layer.norm_before, layer.norm_between, layer.norm_q, layer.norm_k
    norms = [None if norm is None else _in_fp32(norm) for norm in given]
    held += norms
    return _Layer(
        *(None if t is None else t.data_ptr() for t in norms), *linears, layer.keys.data_ptr(), layer.values.data_ptr()
    )


def _in_fp32(t: Tensor) -> Tensor:
    return t.detach().float().contiguous()


@cache
def kernels() -> Any:
    """Returns the compiled functions, or None if they were not built or fail the self-test."""
    return load_functions("decoder steps", FUNCTIONS, self_test, (_Linear, _Layer, _Step))


@torch.inference_mode(False)
def self_test(functions: Any) -> bool:
    """Compares one token behind two others with the same by tensor operations."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def packed(n: int, k: int) -> PackedWeight:
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        return pack_weight(codes, torch.full((n, k // 16), 0.05), bits=4, group_size=16)

    shapes = ((64, 32), (32, 32), (32, 32), (32, 64), (48, 32), (48, 32), (32, 48))  # 4 heads of 16, keys 2
    linears = [(packed(n, k), random(n) if n == 64 else None) for n, k in shapes]
    keys, values, x, norms = random(1, 2, 5, 16), random(1, 2, 5, 16), random(1, 1, 32), random(3, 32)
    of_heads = random(2, 16)
    cos, sin = random(1, 1, 16), random(1, 1, 16)
    got = []
    for dtype in (torch.float32, torch.bfloat16):
        cached = keys.to(dtype, copy=True), values.to(dtype, copy=True)
        layer = DecoderLayer(norms[0], norms[1], linears, *cached, *of_heads)
        got.append(decoder_step_of([layer], norms[2], (1e-5, 1e-6), functions)(x, cos, sin, 2).flatten())
    dense = [(dequantize_packed(weight).double(), 0 if bias is None else bias.double()) for weight, bias in linears]
    want = _by_tensors(x.double().flatten(), norms.double(), of_heads.double(), dense, (keys, values), (cos, sin))
    return all(bool((y - want).norm() < limit * want.norm()) for y, limit in zip(got, (1e-5, 2e-2), strict=True))


def _by_tensors(x: Tensor, norms: Tensor, of_heads: Tensor, linears: Any, cached: Any, angles: Any) -> Tensor:
    def linear(i: int, x: Tensor) -> Tensor:
        return linears[i][0] @ x + linears[i][1]  # type: ignore[no-any-return]

    def norm(i: int, x: Tensor) -> Tensor:
        return norms[i] * x / (x.square().mean() + (1e-6 if i == 2 else 1e-5)).sqrt()

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = x.view(-1, 16)
        x = weight * x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * cos + torch.cat((-x[:, 8:], x[:, :8]), 1) * sin

    cos, sin = (t.double().view(16) for t in angles)
    keys, values = (t[0].double().clone() for t in cached)
    near = norm(0, x)
    keys[:, 2], values[:, 2] = turned(linear(1, near), of_heads[1]), linear(2, near).view(2, 16)
    q = turned(linear(0, near), of_heads[0]).view(2, 2, 16)  # [kv_heads, heads of each, head_dim]
    p = (q @ keys[:, :3].mT / 4).softmax(-1)
    x = x + linear(3, (p @ values[:, :3]).flatten())
    near = norm(1, x)
    gate = linear(4, near)
    return norm(2, x + linear(6, gate * gate.sigmoid() * linear(5, near)))
