"""Multiplies with packed weights as ops that an engine's compiler leaves whole.

An engine compiles its model once for all numbers of rows. What is best depends on that number (tiles, parts of K,
whether the weight is dequantized first): traced once, a decoding step would run what suits the longest prompt. So the
op chooses when it runs, and the CUDA graph of each number of rows holds what suits that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels import PackedWeight, qmatmul, qmatmul_grouped
from gs_kernels.pack.schema import SCHEMA, flatten, unflatten

_library = torch.library.Library("gs_serving", "FRAGMENT")


def _run(x: Tensor, *rest: Any) -> Tensor:
    *weight, bias = rest
    return qmatmul(x, unflatten(*weight), bias)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    *weight, _ = rest
    return x.new_empty(*x.shape[:-1], unflatten(*weight).shape[0])


def _run_grouped(x: Tensor, *rest: Any) -> Tensor:
    *weight, offsets = rest
    return qmatmul_grouped(x, unflatten(*weight), offsets)


def _fake_grouped(x: Tensor, *rest: Any) -> Tensor:
    *weight, offsets = rest
    return x.new_empty(x.shape[0], unflatten(*weight).shape[0] // offsets.shape[0])


_library.define(f"qmatmul(Tensor x, {SCHEMA}, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("qmatmul", _run, "CompositeExplicitAutograd")
torch.library.register_fake("gs_serving::qmatmul", _fake, lib=_library)
_library.define(f"qmatmul_grouped(Tensor x, {SCHEMA}, Tensor offsets) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("qmatmul_grouped", _run_grouped, "CompositeExplicitAutograd")
torch.library.register_fake("gs_serving::qmatmul_grouped", _fake_grouped, lib=_library)


def engine_qmatmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W^T + bias`, as `gs_kernels.qmatmul`; compilers see one op. No gradient."""
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.gs_serving.qmatmul(x, *flatten(weight), bias)
        return product
    return qmatmul(x, weight, bias)


def engine_qmatmul_grouped(x: Tensor, weight: PackedWeight, offsets: Tensor) -> Tensor:
    """`x_e @ W_e^T` of each expert, as `gs_kernels.qmatmul_grouped`; compilers see one op. No gradient."""
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.gs_serving.qmatmul_grouped(x, *flatten(weight), offsets)
        return product
    return qmatmul_grouped(x, weight, offsets)
