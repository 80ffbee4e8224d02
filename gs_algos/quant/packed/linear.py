"""Defines linear layers whose weight is packed codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gs_algos.quant.integer.prepared_call import cached, kind_of
from gs_algos.quant.integer.quantized_tensor import VirtualTensor, on_values
from gs_algos.quant.packed.module import Packed, PackedFormat, autocast_dtype
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight, dequantize_packed, qmatmul, qmatmul_int8, quantize_rows
from gs_kernels.for_layers import prepared_qmatmul, prepared_qmatmul_int8

TOKEN = "int8@token"  # the scheme of rows that are rounded as they come, each with a scale of its own


class PackedLinear(Packed):
    """`y = x @ W^T + bias` with a packed `W [out_features, in_features]`: stands where a `nn.Linear` stood.

    The weight is frozen: x gets its gradient, the weight none. The bias is a parameter that does not require one.
    Under autocast x is cast first, as `nn.Linear` does.

    Args:
        weight: packed, or the packed layer that this one is tied to.
        bias: `[out_features]`.
        dtype: of `.weight`; default: that of the bias, or fp32.
    """

    bias: Tensor | None

    def __init__(
        self, weight: PackedWeight | Packed, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(weight, dtype or (torch.float32 if bias is None else bias.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight: str | Scheme = "int4@group:128") -> Self:
        """Makes the layer with its weight rounded to nearest, e.g. `from_linear(layer, "int4@group:64:mse")`.

        Raises:
            ValueError: if the scheme cannot be packed, its group does not divide in_features, or one is not finite.
        """
        return cls.from_packed(round_to_nearest(linear.weight, weight), linear.bias, linear.weight.dtype)

    @classmethod
    def from_packed(
        cls, weight: PackedWeight | Packed, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Makes the layer around a weight that is packed already; it is not copied."""
        return cls(weight, bias, dtype)

    @classmethod
    def empty(
        cls,
        format: PackedFormat,
        bias: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Makes the layer with tensors of the right shapes that are still to be filled; device may be "meta"."""
        return cls(
            format.empty(device), torch.empty(format.shape[0], dtype=dtype, device=device) if bias else None, dtype
        )

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @out_features.setter
    def out_features(self, value: int) -> None:  # Transformers sets it when nothing is to be resized
        self.keep_rows("out_features", value)

    def forward(self, input: Tensor) -> Tensor:
        # self.bias takes four times as long where it is a parameter
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401
        if input.is_cpu and (kind := kind_of(input)) is not None and not (bias is not None and bias.requires_grad):
            owner = self.owner if self._tied_to else self
            codes = owner._buffers["codes"]
            # forms that change where `.data` is set, which counts no change
            form = codes is None or codes.shape, bias is None or (bias.shape, bias.dtype)
            others = (owner,) if self._tied_to else ()
            ready = cached(self, (kind, bias, form), others, self._prepare, input, bias)
            if ready is not None:
                return ready(input)  # type: ignore[no-any-return]
        dtype = autocast_dtype(input)
        return self._multiply(input if dtype is None else input.to(dtype), bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return qmatmul(x, self.packed, bias)

    def _prepare(self, x: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        product = prepared_qmatmul(torch.empty(x.shape, dtype=x.dtype, device=x.device), self.packed, bias)
        return None if product is None else _of_values(product.at(x.shape, x.dtype), x)

    def extra_repr(self) -> str:
        sizes: dict[str, Any] = {"in_features": self.in_features, "out_features": self.out_features}
        return (
            f"{', '.join(f'{k}={v}' for k, v in sizes.items())}, bias={self.bias is not None}, {super().extra_repr()}"
        )


def _of_values(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns what multiplies inputs of the type of x: plain ones, or those that stand for values."""
    return partial(on_values, multiply) if isinstance(x, VirtualTensor) else multiply


class DynamicPackedLinear(PackedLinear):
    """`y = x_q @ W^T + bias` on whole numbers: each row of x is rounded to int8 with a scale of its own, as it comes.

    `x_q = round(x / s) * s`, s = max |row| / 127. A GPU multiplies int8 codes, and so does a CPU. No gradient.
    """

    act: ClassVar[str] = TOKEN

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return qmatmul_int8(*quantize_rows(x), self.packed, bias, dtype=x.dtype)

    def _prepare(self, x: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        codes, scale = quantize_rows(torch.zeros(x.shape, dtype=x.dtype, device=x.device))
        product = prepared_qmatmul_int8(codes, scale, self.packed, bias, x_zero=None, dtype=x.dtype)
        multiply = None if product is None else product.at(x.shape)
        return None if multiply is None else _of_values(lambda x: multiply(*quantize_rows(x)), x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class PackedConv1D(PackedLinear):
    """`y = x @ W + bias` with `W [K, N]`: stands where Conv1D of Transformers stood. Packed are the rows of W^T.

    `nx` is K and `nf` is N, as there.
    """

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized weight `[K, N]`, made anew at each access."""
        return dequantize_packed(self.packed, self.dtype).t()

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features
