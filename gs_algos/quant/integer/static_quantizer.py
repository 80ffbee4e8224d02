"""Quantizes activations of converted networks on a fixed grid, to floats or to int8 codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gs_algos.core.tensor_rules import FINITE, POSITIVE, Rules, whole_within
from gs_algos.quant.fake_quant.quantizers import Quantizer
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.fixed_dtype import FixedDtypeBuffers
from gs_algos.quant.integer.prepared_call import PREPARED, cached, kind_of
from gs_algos.quant.integer.quantized_tensor import (
    DeferredOutput,
    QuantizedTensor,
    VirtualTensor,
    dequantized,
    may_return_int8,
    on_values,
)
from gs_algos.quant.scheme import Scheme
from gs_kernels import fake_quant, quantize
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.for_layers import Grid, make_grid, to_codes_of
from gs_kernels.runtime.dispatch import takes_cpu
from gs_kernels.runtime.torch_private import is_eager


class StaticQuantizer(FixedDtypeBuffers, OffFastPath):
    """Quantizes one activation on a fixed grid: scale `[1]`, zero `[1]` fp32, real = (q - zero) * scale.

    A learnt zero point may lie beyond the codes: then none of them stands for 0.0.
    """

    fixed_dtype = ("scale", "zero")
    scale: Tensor
    zero: Tensor
    _compared: tuple[Grid, Grid, bool] | None = None  # grids, and whether they are the same

    def __init__(self, scheme: Scheme, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.float32, device=device))
        self.emits_int8 = False  # whether it should return int8 codes: its consumers read them
        self.whole_zero = 0  # the zero point of `signed_codes` as a number, which needs no read of a tensor
        self.refresh_zero_point()
        self._constants: tuple[Tensor, Tensor, int, int, Grid] | None = None

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Quantizes f(x); activation: f, which a sum of codes takes along in the same pass."""
        int8 = self.returns_int8() and may_return_int8(x)
        if activation != "none":
            codes = x.codes_on(self, activation) if int8 and type(x) is DeferredOutput else None
            if codes is not None:
                return QuantizedTensor.of(codes, self, x.like)  # type: ignore[attr-defined]
            x = ACTIVATIONS[activation].function(x)
        if int8:
            codes = self.int8_codes(x)
            if isinstance(x, VirtualTensor):
                return QuantizedTensor.of(codes, self, x.like)
            return QuantizedTensor(codes, self, x.dtype)
        if x.numel() == 0:
            return dequantized(x)  # type: ignore[no-any-return]
        scale, zero, low, high = self.scale, self.zero, self.scheme.qmin, self.scheme.qmax
        return on_values(lambda x: fake_quant(x, scale, zero, qmin=low, qmax=high), x)

    @torch.no_grad()
    def copy_from(self, quantizer: Quantizer) -> None:
        """Copies the grid of a trained quantizer."""
        scale, zero = quantizer.grid()
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.refresh_zero_point()

    def state_rules(self) -> Rules:
        if self.scheme.learned:
            return {"scale": FINITE, "zero": FINITE}
        return {"scale": POSITIVE, "zero": whole_within(self.scheme.qmin, self.scheme.qmax)}

    def refresh_zero_point(self) -> None:
        """Reads the zero point anew. Needed after it was written by hand."""
        if not self.zero.is_meta:
            self.whole_zero = round(float(self.zero)) - (0 if self.scheme.format.signed else 128)

    def holds_zero(self) -> bool:
        """Says whether a code stands for 0.0."""
        low, high = self._signed_limits
        return low <= self.whole_zero <= high

    def returns_int8(self) -> bool:
        """Says whether it returns int8 codes: 0.0 must be among them for operations that commute with rounding."""
        return self.emits_int8 and self.holds_zero()

    def __getstate__(self) -> dict[str, Any]:
        # what was computed from the tensors is not that of a copy's, which may not count their changes
        return {key: value for key, value in self.__dict__.items() if key != PREPARED} | {"_constants": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh_zero_point()

    def codes(self, x: Tensor) -> Tensor:
        """Quantizes x to int8 codes (uint8 for an unsigned grid), same shape."""
        if x.numel() == 0:
            return torch.empty_like(x, dtype=torch.int8 if self.scheme.qmin < 0 else torch.uint8)
        return quantize(x, self.scale, self.zero, qmin=self.scheme.qmin, qmax=self.scheme.qmax)

    def signed_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (int8 codes of x, their zero point `[1]`); both are 128 lower for an unsigned grid."""
        return self.int8_codes(x), self.signed_zero()

    def int8_codes(self, x: Tensor) -> Tensor:
        """Returns the codes of `signed_codes`."""
        if isinstance(x, VirtualTensor):
            ready = x.codes_on(self)
            if ready is not None:
                return ready
            x = x.values()
        kind = kind_of(x)
        run = None if kind is None else cached(self, kind, (), self._prepared, x)
        if run is not None:
            return run(x)  # type: ignore[no-any-return]
        codes = self.codes(x)
        return codes if codes.dtype == torch.int8 else (codes ^ 128).view(torch.int8)

    def codes_like(self, x: Tensor, producers: tuple[StaticQuantizer, ...]) -> Callable[[Tensor], Tensor]:
        """Returns `int8_codes` for inputs of the type, shape, strides and device of x, while the grid stays.

        producers: other grids whose codes are those of this one.
        """
        if type(x) is QuantizedTensor:
            return lambda x: x.codes if x.quantizer in producers else x.codes_on(self)  # type: ignore[attr-defined]
        run = None if type(x) is DeferredOutput else self._prepared(x)
        return self.int8_codes if run is None else run

    def _prepared(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Returns what quantizes floats like x on the CPU without the checks and copies of `quantize`.

        None where those are needed.
        """
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        if not dense or x.dtype != torch.float32 or x.numel() == 0 or not takes_cpu(x):
            return None
        numbers = self.constants().numbers
        if numbers is None or not math.isfinite(numbers.of_floats[0]):  # the op says what is wrong
            return None
        return to_codes_of(x.numel(), numbers.of_floats, numbers.moved)

    def signed_zero(self) -> Tensor:
        if self.scheme.format.signed:
            return self.zero
        return self.constants().zero if is_eager(self.zero) else self.zero - 128

    def constants(self) -> Grid:
        """Returns the grid of `signed_codes` as `requantize` takes it; computed again when scale or zero change."""
        own, held = self._buffers, self._constants
        scale, zero = own["scale"], own["zero"]
        assert scale is not None and zero is not None
        same = held is not None and held[0] is scale and held[1] is zero
        if held is not None and same and held[2] == scale._version and held[3] == zero._version:
            return held[4]
        return self._make_constants(scale, zero)

    def _make_constants(self, given_scale: Tensor, given_zero: Tensor) -> Grid:
        with torch.inference_mode(False), torch.no_grad():
            lower = 0 if self.scheme.format.signed else 128
            constants = make_grid(given_scale.clone(), given_zero.clone(), self.scheme.qmin, self.scheme.qmax, lower)
        tracked = not (given_scale.is_inference() or given_zero.is_inference())
        stamp = (given_scale._version, given_zero._version) if tracked else None
        self._constants = None if stamp is None else (given_scale, given_zero, *stamp, constants)
        return constants

    def signed_limits(self) -> tuple[int, int]:
        """Returns the smallest and largest of `signed_codes`."""
        return self._signed_limits

    @cached_property
    def _signed_limits(self) -> tuple[int, int]:
        shift = 0 if self.scheme.format.signed else 128
        return self.scheme.qmin - shift, self.scheme.qmax - shift

    def same_grid(self, other: StaticQuantizer) -> bool:
        """Says whether both grids give every value the same code. Reads values once, until a grid changes."""
        if self is other:
            return True
        mine, others = self.constants(), other.constants()
        if self._compared is None or self._compared[0] is not mine or self._compared[1] is not others:
            same = (
                (mine.low, mine.high) == (others.low, others.high)
                and torch.equal(mine.scale, others.scale)
                and torch.equal(mine.zero, others.zero)
            )
            self._compared = mine, others, same
        return self._compared[2]

    def extra_repr(self) -> str:
        return str(self.scheme)
