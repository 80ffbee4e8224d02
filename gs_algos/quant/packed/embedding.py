"""Defines an embedding whose table is packed codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gs_algos.quant.packed.module import Packed, PackedFormat
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight
from gs_kernels.pack.rows import dequantize_rows


class PackedEmbedding(Packed):
    """Looks rows up in a packed table `[num_embeddings, embedding_dim]`: only those rows are dequantized.

    Args:
        weight: packed, or the packed layer that this one is tied to.
        padding_idx: kept for `repr` and for code that asks; a frozen table has no gradient to leave out.
        dtype: of the rows that it returns.
    """

    def __init__(
        self, weight: PackedWeight | Packed, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight, dtype)
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight: str | Scheme = "int8@group:64") -> Self:
        """Makes the layer with its table rounded to nearest.

        Raises:
            ValueError: as `PackedLinear.from_linear`, and if rows are renormalized when read (`max_norm`).
        """
        if embedding.max_norm is not None:
            raise ValueError(
                f"PackedEmbedding: max_norm must be None, got {embedding.max_norm}: it changes rows as they are read"
            )
        packed = round_to_nearest(embedding.weight, weight)
        return cls(packed, embedding.padding_idx, embedding.weight.dtype)

    @classmethod
    def empty(
        cls,
        format: PackedFormat,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Makes the layer with tensors of the right shapes that are still to be filled; device may be "meta"."""
        return cls(format.empty(device), padding_idx, dtype)

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:  # Transformers sets it when nothing is to be resized
        self.keep_rows("num_embeddings", value)

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        ids = input
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        return dequantize_rows(self.packed, ids.reshape(-1), self.dtype).view(*ids.shape, -1)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {super().extra_repr()}"
