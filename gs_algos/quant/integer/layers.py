"""Defines the layers that trained fake-quantized layers are converted to: packed integer codes and scales, no floats.

They run in integer arithmetic where they can (int8 codes on both sides, int32 accumulation), else they multiply floats
with their packed codes. `path()` says which and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_algos.core.tensor_rules import FINITE, Rules, whole_within
from gs_algos.quant.integer.prepared_call import PreparedConv, cached, kind_of
from gs_algos.quant.integer.quantized_tensor import (
    QuantizedTensor,
    dequantized,
    laid_values,
    may_return_int8,
    plain,
    values,
)
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.packed.module import WEIGHT_TENSORS, Packed, PackedFormat, runs_kernels, zero_as
from gs_algos.quant.scheme import Scheme
from gs_kernels import (
    PackedWeight,
    PerGroup,
    choose_qparams,
    code_sums,
    pack_weight,
    qconv2d_int8,
    qmatmul,
    qmatmul_int8,
)
from gs_kernels.for_layers import (
    LARGEST_GROUP,
    Int8Convolution,
    noted,
    prepared_qconv2d_int8,
    prepared_qmatmul,
    prepared_qmatmul_int8,
    sums_fit,
)
from gs_kernels.pack.checks import FLOATS, dtype_name
from gs_kernels.pack.layouts import BITS
from gs_kernels.runtime.dispatch import backend_setting
from gs_kernels.runtime.instructions import multiplies_int8
from gs_kernels.tuning.arithmetic import Product, prefers_floats

Residual: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]  # itself, and scale and zero point of codes

MAX_PARTS = 64  # of a filter whose sums no int32 holds
INTEGER = "integer: int8 x int8 -> int32"
WITHOUT_VNNI = "integer: products of 16 bits, for this CPU has no VNNI"
TO_CONSUMERS = " -> int8 for the next layer"
TO_OWN_GRID = " -> int8 on its own grid"


class QuantizedLayer(Packed):
    """Holds a packed integer weight, (codes - zero) * scale, and the grids of its input and output.

    Rows of a weight `[O, ...]` are flattened. Scales (and zero points, of an asymmetric grid) are `[O, groups]` fp32,
    whatever the granularity; bias `[O]` fp32. A scale is negative where a batch norm with negative gamma was folded in.
    Codes of 3, 5, 6 and 7 bits take the bytes of 4 and 8.

    Args:
        weight: as `packed_codes` gives it.
        scheme: that the weight was trained with.
        bias: `[O]`.
        input, output: schemes of the activations in front of and behind the product.
        dtype: that the float layer had.
    """

    fixed_dtype = (*WEIGHT_TENSORS, "bias")
    bias: Tensor | None
    input_quantizer: StaticQuantizer | None
    output_quantizer: StaticQuantizer | None

    def __init__(
        self,
        weight: PackedWeight,
        scheme: Scheme | LevelGrid,
        bias: Tensor | None = None,
        input: Scheme | None = None,
        output: Scheme | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, dtype)
        self.scheme = scheme
        self.register_buffer("bias", None if bias is None else bias.float())
        self.input_quantizer = None if input is None else StaticQuantizer(input, weight.device)
        self.output_quantizer = None if output is None else StaticQuantizer(output, weight.device)
        # grids of other layers: of codes that come in, and of those that go out; in tuples, for they are not children
        self._producer_grids: tuple[StaticQuantizer, ...] = ()
        self._consumer_grids: tuple[StaticQuantizer, ...] = ()

    def state_rules(self) -> Rules:
        zero = FINITE if self.scheme.learned else whole_within(0, 2**self.bits - 1)
        return {**super().state_rules(), "zero": zero, "bias": FINITE}

    def integer_refusals(self, device: torch.device) -> list[str]:
        """Says why the product cannot run on integers; empty if it can."""
        raise AssertionError("every QuantizedLayer says why")

    def path(self) -> str:
        reasons = self.integer_refusals(self.packed.device)
        return f"{super().path()}: {', '.join(reasons)}" if reasons else INTEGER

    def _refusals_on(self, device: torch.device) -> list[str]:
        """Lists why a device multiplies no integers for this layer."""
        if not runs_kernels(device):
            return [] if device.type == "cpu" else [f"no integer products for {device.type}"]
        reasons = self._kernel_refusals()
        floats = None if reasons else prefers_floats(self._product(), device)
        return reasons if floats is None else [floats]

    def _kernel_refusals(self) -> list[str]:
        """Lists why Triton's kernels do not give the integers of a CPU."""
        raise AssertionError("every QuantizedLayer says why")

    def _product(self) -> Product:
        """Describes the product to whoever chooses its arithmetic."""
        raise AssertionError("every QuantizedLayer has one")

    def _on_integers(self, x: Tensor) -> bool:
        """Says whether the product with x runs on integers; gradients need that of floats."""
        if x.dtype not in FLOATS:
            names = "float32 / float16 / bfloat16"
            raise TypeError(
                f"{type(self).__name__}: the input must be {names}, got {dtype_name(x.dtype)}; cast it first"
            )
        return not (x.requires_grad and torch.is_grad_enabled()) and not self.integer_refusals(x.device)

    def _shifted(self) -> bool:
        """Says whether 0.0 may have a code other than 0 in x."""
        scheme = None if self.input_quantizer is None else self.input_quantizer.scheme
        return scheme is not None and not (scheme.symmetric and scheme.format.signed)

    def _codes_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (int8 codes of x on the input grid, their zero point); x may be codes already."""
        quantizer = self.input_quantizer
        assert quantizer is not None
        return self._int8_codes(x), quantizer.signed_zero()

    def _int8_codes(self, x: Tensor) -> Tensor:
        if type(x) is QuantizedTensor and x.quantizer in self._producer_grids:
            return x.codes
        assert self.input_quantizer is not None
        return self.input_quantizer.int8_codes(x)

    def _quantize_output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else self.output_quantizer(y)


class QuantizedLinear(QuantizedLayer):
    """`y = x @ weight^T + bias` on codes: int8 x int8 -> int32 where it can, else floats times packed codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_features, self.in_features = self.shape
        # what the zero point of x is multiplied with; follows from the codes, so it is not saved
        self.register_buffer("sums", None, persistent=False)
        self.arrange()

    def arrange(self) -> None:
        super().arrange()
        if "sums" in self._buffers and self.codes is not None and not self.codes.is_meta:
            self.sums = code_sums(self.packed) if self._shifted() else None

    def integer_refusals(self, device: torch.device) -> list[str]:
        """Says why the product cannot run on integers; empty if it can."""
        grouped = ["scales are per group"] if self.group_size != self.in_features else []
        return [*_refusals_of(self.input_quantizer), *grouped, *self._refusals_on(device)]

    def _kernel_refusals(self) -> list[str]:
        fits = sums_fit(self.packed, self._shifted())
        wide = [] if fits or self.group_size != self.in_features else [_wide(self.in_features)]
        return [*_zero_refusals(self.input_quantizer), *wide]

    def _product(self) -> Product:
        return Product("qmatmul", *self.shape, self.bits, 8 * self.dtype.itemsize)

    def forward(self, input: Tensor) -> Tensor:
        x, ready, output = input, self._prepared_call(input), self._modules.get("output_quantizer")
        if ready is not None:
            y = ready(x)
            return plain(y, y.stride()) if output is None else output(y)  # type: ignore[no-any-return]
        if self._on_integers(x):
            return self._quantize_output(self._integer(x))
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return self._quantize_output(qmatmul(x, self.packed, self.bias))

    def _integer(self, x: Tensor) -> Tensor:
        """Computes `((qx - zx) @ (qw - zw)^T) * (sx * sw) + bias`; sums in int32, one cast at the end."""
        quantizer = self.input_quantizer
        assert quantizer is not None
        codes, zero = self._codes_and_zero(x)
        return qmatmul_int8(
            codes,
            quantizer.scale,
            self.packed,
            self.bias,
            x_zero=zero if self._shifted() else None,
            code_sums=self.sums,
            dtype=x.dtype,
        )

    def _prepared_call(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Returns the prepared product for rows like those of x; None if there is none."""
        kind, grid = kind_of(x), self._modules.get("input_quantizer")
        if kind is None:
            return None
        others = () if grid is None else (grid,)
        ready: Callable[[Tensor], Tensor] | None
        ready = cached(self, (kind, self._producer_grids), others, self._prepare, x)
        return ready

    def _prepare(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if x.dtype not in FLOATS:
            return None
        quantizer = self.input_quantizer
        if quantizer is None or self.integer_refusals(x.device):
            floats = prepared_qmatmul(torch.empty(x.shape, dtype=x.dtype, device=x.device), self.packed, self.bias)
            multiply = None if floats is None else floats.at(x.shape, x.dtype)
            operand = laid_values if quantizer is None else lambda x: laid_values(quantizer(x))
            return None if multiply is None else lambda x: noted(multiply, operand(x))
        scale, codes = quantizer.scale, quantizer.codes_like(x, self._producer_grids)
        product = prepared_qmatmul_int8(
            torch.empty(x.shape, dtype=torch.int8, device=x.device),
            scale,
            self.packed,
            self.bias,
            x_zero=quantizer.signed_zero() if self._shifted() else None,
            dtype=x.dtype,
        )
        run = None if product is None else product.at(x.shape)
        return None if run is None else lambda x: run(codes(x), scale)


class QuantizedConv(Convolution, QuantizedLayer):
    """`y = conv(x, weight) + bias` with the geometry of the layer it replaces, on codes as `QuantizedLinear`.

    Args:
        geometry: as `geometry_of` gives it.
        filter: the weight's shape behind its first axis.
    """

    def __init__(self, geometry: dict[str, Any], filter: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_geometry(geometry, filter)
        # what the zero point of x is multiplied with; follows from the codes, so it is not saved
        self.register_buffer("sums", None, persistent=False)
        self.arrange()

    def arrange(self) -> None:
        super().arrange()
        if "sums" in self._buffers and self.codes is not None and not self.codes.is_meta:
            parts = self._split_weight()
            self.sums = code_sums(parts) if self._shifted() and parts and not self.refusals() else None

    def integer_refusals(self, device: torch.device) -> list[str]:
        """Says why the convolution cannot run on integers; empty if it can."""
        grid, wide = self.input_quantizer, [] if self._split_weight() else [_wide(self.shape[1])]
        return [*_refusals_of(grid), *_zero_refusals(grid), *self.refusals(), *wide, *self._refusals_on(device)]

    def _kernel_refusals(self) -> list[str]:
        one = self.packed.scale.shape[1] == 1
        wide = [_wide(self.shape[1])] if one and self.shape[1] > LARGEST_GROUP else []
        size = self.group_size
        return wide + ([] if one or size % 32 == 0 else [f"scales are per {size} elements, no multiple of 32"])

    def _product(self) -> Product:
        channels, groups = self.filter[0], self.geometry["groups"]
        n, k = self.shape[0] // groups, self.shape[1]
        return Product("qconv2d", n, k, self.bits, 8 * self.dtype.itemsize, groups, channels)

    def _split_weight(self) -> PackedWeight | None:
        """Returns the weight with wide rows split so that int32 holds the sums; None if they cannot be split."""
        return split_rows(self.packed, LARGEST_GROUP)

    def path(self) -> str:
        path = super().path()
        if path.startswith(INTEGER) and self.packed.device.type == "cpu" and not multiplies_int8():
            path = WITHOUT_VNNI + path.removeprefix(INTEGER)
        if not path.startswith("integer"):
            return path
        return path + (TO_CONSUMERS if self._consumer_grids else TO_OWN_GRID if self._emits_own_grid() else "")

    def emit_int8_to(self, consumers: Sequence[QuantizedLayer]) -> None:
        """Makes the layer emit int8 on the consumers' common grid; whatever else reads it sees floats."""
        grids = [m.input_quantizer for m in consumers if m.input_quantizer is not None]
        self._consumer_grids = (grids[0],)
        for consumer in consumers:
            consumer._producer_grids = (*consumer._producer_grids, grids[0])

    def _emits_own_grid(self) -> bool:
        return self.output_quantizer is not None and self.output_quantizer.returns_int8()

    def run(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        codes = type(residual) is QuantizedTensor
        dtype = None if residual is None else torch.int8 if codes else residual.dtype
        ready = self.prepared_call(x, activation, dtype)
        if ready is not None:
            y = ready(x, *_operands(residual)) if ready.on_integers else ready(x, values(residual))
            return y if ready.grid is None else QuantizedTensor(y, ready.grid, ready.like[2])
        if self._on_integers(x):
            # a compiler sees floats, of which the next layer makes codes
            grid = self._output_grid() if may_return_int8(x) else None
            y = self._integer(x, grid, activation, _operands(residual))
            return self._quantize_output(y) if grid is None else QuantizedTensor(_limited(y, grid), grid, x.dtype)
        x = values(x) if self.input_quantizer is None else dequantized(self.input_quantizer(values(x)))
        return self._quantize_output(self.convolve(x, self.bias, values(residual), activation))

    def _output_grid(self) -> StaticQuantizer | None:
        """Returns the grid of the int8 output; None if the layer returns floats."""
        if self._consumer_grids:
            return self._consumer_grids[0]
        return self.output_quantizer if self._emits_own_grid() else None

    def _integer(self, x: Tensor, grid: StaticQuantizer | None, activation: str, residual: Residual) -> Tensor:
        """Computes `act(conv(qx - zx, qw - zw) * (sx * sw) + bias + residual)`, cast once, or rounded to codes."""
        quantizer, parts = self.input_quantizer, self._split_weight()
        assert quantizer is not None and parts is not None
        image, geometry = self.geometry_for(x)
        codes, zero = self._codes_and_zero(image)
        y = qconv2d_int8(
            codes,
            quantizer.scale,
            parts,
            self.bias,
            **geometry,
            residual=None if residual[0] is None else self.as_image(residual[0]),
            residual_scale=residual[1],
            residual_zero=residual[2],
            x_zero=zero if self._shifted() else None,
            code_sums=self.sums,
            activation=activation,
            out_scale=None if grid is None else grid.scale,
            out_zero=None if grid is None else grid.signed_zero(),
            dtype=x.dtype,
            keep_dense=True,
        )
        return self.like_input(y, x)

    def prepared_call(self, x: Tensor, activation: str, residual: torch.dtype | None = None) -> PreparedConv | None:
        kind, modules, consumers = kind_of(x), self._modules, self._consumer_grids
        if kind is None:
            return None
        quantizer, own = modules.get("input_quantizer"), modules.get("output_quantizer")
        emits = own is not None and own.emits_int8
        key = (kind, activation, residual, self.channels_last, self._producer_grids, consumers, emits)
        others = consumers if own is None else (own, *consumers)
        others = others if quantizer is None else (quantizer, *others)
        ready: PreparedConv | None = cached(self, key, others, self._prepare, x, activation, residual)
        return ready

    def _prepare(self, x: Tensor, activation: str, residual: torch.dtype | None) -> PreparedConv | None:
        grid, quantizer = self._output_grid(), self.input_quantizer
        if not self.may_prepare_for(x):
            return None
        if quantizer is None or self.integer_refusals(x.device):
            operand = values if quantizer is None else lambda x: values(quantizer(x))
            added = x.dtype if residual == torch.int8 else residual
            return self.prepare_floats(x, activation, added, operand, self.output_quantizer)
        others = (quantizer,) if grid is None else (quantizer, grid)
        key = (activation, x.dtype, x.device, x.shape[1:], backend_setting())
        convolution = cached(self, key, others, self._convolution, x, grid, activation)
        if convolution is None:
            return None
        run, codes = convolution.at(self.image_size(x), residual), quantizer.codes_like(x, self._producer_grids)
        output = self.output_quantizer if grid is None else None
        return PreparedConv(self.of_images(run), codes, output, grid, self._like(x), on_integers=True)

    def _convolution(self, x: Tensor, grid: StaticQuantizer | None, activation: str) -> Int8Convolution | None:
        quantizer, parts = self.input_quantizer, self._split_weight()
        assert quantizer is not None and parts is not None
        return prepared_qconv2d_int8(
            torch.empty(self.image_size(x), dtype=torch.int8, device=x.device),
            quantizer.scale,
            parts,
            self.bias,
            **self.window(),
            x_zero=quantizer.signed_zero() if self._shifted() else None,
            activation=activation,
            out_scale=None if grid is None else grid.scale,
            out_zero=None if grid is None else grid.signed_zero(),
            out_limits=(-128, 127) if grid is None else grid.signed_limits(),
            dtype=x.dtype,
        )

    def extra_repr(self) -> str:
        return f"{(self.shape[0], *self.filter)}, {self.scheme}, stride={self.geometry['stride']}"


def _operands(residual: Tensor | None) -> Residual:
    """Returns what an integer convolution adds: codes and their grid, or floats."""
    if not isinstance(residual, QuantizedTensor):
        return values(residual), None, None
    grid = residual.quantizer.constants()
    return residual.codes, grid.scale, grid.zero


def _limited(codes: Tensor, grid: StaticQuantizer) -> Tensor:
    """Limits int8 codes to those that the grid has."""
    low, high = grid.signed_limits()
    return codes if (low, high) == (-128, 127) else codes.clamp_(low, high)


def _wide(k: int) -> str:
    return f"no int32 holds the sums of {k:,} products"


def _zero_refusals(quantizer: StaticQuantizer | None) -> list[str]:
    beyond = quantizer is not None and not -128 <= quantizer.whole_zero <= 127
    return ["no 8-bit code is the zero point of its activations"] if beyond else []


def _refusals_of(quantizer: StaticQuantizer | None) -> list[str]:
    if quantizer is None:
        return ["activations are not quantized"]
    one_bit = quantizer.scheme.bits == 1 and quantizer.scheme.symmetric
    return ["the activation grid has no level for 0"] if one_bit else []


def split_rows(weight: PackedWeight, largest: int) -> PackedWeight | None:
    """Splits rows of one scale into equal parts of at most `largest` codes; None if no small number divides a row.

    All parts share the scale and the zero point of the row, and their memory.
    """
    k = weight.group_size
    if k <= largest:
        return weight
    count = next((n for n in range(-(-k // largest), MAX_PARTS + 1) if k % n == 0), None)
    if count is None or weight.scale.shape[1] > 1:
        return None
    zero = weight.zero.expand(-1, count) if isinstance(weight.zero, Tensor) else weight.zero
    return replace(weight, scale=weight.scale.expand(-1, count), zero=zero, group_size=k // count)


def stored_bits(bits: int) -> int:
    """Returns the width that codes of so many bits are packed at: the next of 1, 2, 4 and 8."""
    return min(width for width in BITS if width >= bits)


def packed_codes(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> PackedWeight:
    """Packs the codes `[O, ...]` of a scheme, exactly.

    Args:
        codes: int8, or uint8 of an unsigned grid.
        scale, zero: `[C]` fp32; C is 1, O, or O * groups.
    """
    rows = codes.flatten(1)
    size = rows.shape[1] // max(1, scale.numel() // rows.shape[0])
    weight = pack_weight(rows, scale, zero, bits=stored_bits(scheme.bits), group_size=size)
    return zero_as(weight, constant=scheme.symmetric)


def empty_codes(shape: Sequence[int], scheme: Scheme, device: torch.device | str) -> PackedWeight:
    """Makes an unfilled packed weight of the form that `packed_codes` gives for a weight `shape [O, ...]`."""
    n, k = shape[0], math.prod(shape[1:])
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else k
    some = torch.ones(1, dtype=torch.float32, device="cpu")
    _, zero = choose_qparams(-some, some, qmin=scheme.qmin, qmax=scheme.qmax, symmetric=True)
    shift = 2 ** (stored_bits(scheme.bits) - 1) if scheme.format.signed else 0
    constant = float(zero) + shift if scheme.symmetric else None
    return PackedFormat(stored_bits(scheme.bits), (n, k), size, constant, "float32").empty(device)
