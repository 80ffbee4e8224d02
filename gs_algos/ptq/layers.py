"""Turns live layers into ones that round their weight: their class is swapped, their parameters stay.

Until it is calibrated a layer rounds its float weight to nearest in each forward; then its weight holds rounded values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.core.modules import swapped_class
from gs_algos.core.tensor_rules import FINITE, POSITIVE, Rules
from gs_algos.ptq.journal import Solved
from gs_algos.quant.fake_quant.batch_norm import with_values
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.fixed_dtype import FixedDtypeBuffers
from gs_algos.quant.packed.grid import Grid
from gs_algos.quant.packed.linear import TOKEN
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.packed.packable import is_conv1d, matrix_of
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight, quantize_rows
from gs_kernels.cpu.matmul import linear


class WeightGrid(FixedDtypeBuffers):
    """Holds the grid of a weight: scales and zero points `[N, G]` as they are stored; scales of 8 bits in fp32."""

    fixed_dtype: ClassVar[tuple[str, ...]] = ("scale", "zero", "divisor")
    scale: Tensor
    zero: Tensor
    divisor: Tensor | None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.scheme, self._dtype = grid.scheme, grid.dtype
        dtype = torch.float32 if grid.scheme.is_float else grid.dtype
        self.register_buffer("scale", grid.scale.to(dtype))
        self.register_buffer("zero", grid.zero.to(dtype))
        self.register_buffer("divisor", grid.divisor)

    @classmethod
    def empty(cls, format: PackedFormat, scheme: Scheme, device: torch.device) -> WeightGrid:
        """Makes one that is still to be filled."""
        weight = format.empty(device)
        scale = torch.ones_like(weight.scale, dtype=torch.float32)
        return cls(Grid(scale, torch.zeros_like(scale), scheme, weight.scale.dtype, weight.divisor))

    @property
    def grid(self) -> Grid:
        # an integer grid's buffers may have been loaded in another dtype than it was made with
        dtype = self._dtype if self.scheme.is_float else self.scale.dtype
        return Grid(self.scale.float(), self.zero.float(), self.scheme, dtype, self.divisor)

    def set(self, grid: Grid) -> None:
        """Takes another grid of the same weight."""
        with torch.no_grad():
            dtype = torch.float32 if grid.scheme.is_float else grid.dtype
            self.scale, self.zero, self.divisor = grid.scale.to(dtype), grid.zero.to(dtype), grid.divisor
            self._dtype = grid.dtype

    def state_rules(self) -> Rules:
        return {"scale": FINITE, "zero": FINITE, "divisor": POSITIVE}

    def extra_repr(self) -> str:
        return str(self.scheme)


class Rounded(nn.Module, OffFastPath):
    """Rounds its weight, and the rows it reads if `act` says so. Mixed in front of the layer's own class.

    act: `int8@token` or None.
    solved: whether the weight holds rounded values already.
    is_linear: whether its own class does what `nn.Linear` does.
    """

    prefix = "Rounded"
    weight_grid: WeightGrid
    act: str | None
    solved: bool
    is_linear: bool

    @property
    def weight(self) -> Tensor:
        """Returns the rounded weight. The parameter itself is `layer._parameters["weight"]`."""
        parameter = self.float_weight
        return parameter if self.solved else self.rounded(parameter)

    @property
    def float_weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def rounded(self, weight: Tensor) -> Tensor:
        """Returns the weight rounded to the nearest values of the grid, in its dtype and shape."""
        grid, rows = self.weight_grid.grid, matrix_of(self, weight.detach())
        return self.in_shape(grid.values(grid.codes(rows))).to(weight.dtype)

    def in_shape(self, rows: Tensor) -> Tensor:
        """Returns a matrix `[N, K]` in the shape of the layer's weight."""
        return rows.t().contiguous() if is_conv1d(self) else rows.view(self.float_weight.shape)

    @torch.no_grad()
    def set_weight(self, grid: Grid, codes: Tensor) -> None:
        """Takes codes `[N, K]` of a grid as its weight."""
        self.weight_grid.set(grid)
        self.float_weight.copy_(self.in_shape(grid.values(codes)))
        self.solved = True

    def packed_weight(self) -> PackedWeight:
        """Returns the packed rows of the weight, whose values are those of `weight`."""
        grid = self.weight_grid.grid
        return grid.packed(grid.codes(matrix_of(self, self.float_weight.detach())))

    def seen(self, x: Tensor) -> Tensor:
        """Returns what the layer multiplies of its input: rounded, if `act` says so."""
        if self.act is None:
            return x
        with torch.no_grad():
            codes, scale = quantize_rows(x)
            rounded = (codes.float() * scale.unsqueeze(-1)).to(x.dtype)
        return with_values(x, rounded) if x.requires_grad else rounded

    def forward(self, input: Tensor) -> Tensor:
        if self.is_linear:
            return linear(self.seen(input), self.weight, self.bias)  # type: ignore[arg-type]
        return super().forward(self.seen(input))  # type: ignore[misc]


def swap_layers(layers: Iterable[nn.Module], grid: WeightGrid, act: str | None) -> None:
    """Makes live layers that share one weight round it to one grid."""
    for layer in layers:
        live: Any = layer
        live.is_linear = type(layer).forward is nn.Linear.forward
        live.__class__ = swapped_class(Rounded, type(layer))
        live.weight_grid, live.solved = grid, False
        live.act = act if act == TOKEN and not isinstance(layer, nn.Embedding) else None


@dataclass(frozen=True)
class Task:
    """Describes one weight to be rounded: its site, the layer that owns it, how it is to be rounded."""

    site: str
    layers: tuple[Rounded, ...]  # that share it, its owner first
    scheme: Scheme
    rounding: str

    @property
    def layer(self) -> Rounded:
        return self.layers[0]

    @property
    def by_data(self) -> bool:
        """Says whether data tells how the weight is to be rounded: not that of an embedding."""
        return not isinstance(self.layer, nn.Embedding)


def install(layers: Sequence[Any], solved: Solved) -> None:
    """Gives layers that share a weight the codes, the grid and the bias that were found for it."""
    for layer in layers:
        layer.set_weight(solved.grid, solved.codes)
        if solved.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(solved.bias)


@contextmanager
def floating(layers: Iterable[Rounded]) -> Iterator[None]:
    """Lets layers that are not solved yet multiply their float weights, and read floats."""
    layers = [layer for layer in layers if not layer.solved]
    before = [layer.act for layer in layers]
    for layer in layers:
        layer.solved, layer.act = True, None
    try:
        yield
    finally:
        for layer, act in zip(layers, before, strict=True):
            layer.solved, layer.act = False, act
