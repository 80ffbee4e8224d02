"""Makes layers that use the Parameters of another module: registered in both, saved by the other one only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Borrowed(nn.Module):
    """Lets a layer class use parameters of another module, mixed in front of it. `borrowed`: which those are.

    The object is one and the same in both modules, so `.to()`, deepcopy and DDP treat it as any tied weight. The
    state_dict has it under the owner's name only.
    """

    borrowed: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self.borrowed:
            destination.pop(prefix + key, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in self.borrowed]


class BorrowedConv1d(Borrowed, nn.Conv1d):
    """Computes `F.conv1d` as a layer."""


class BorrowedConv2d(Borrowed, nn.Conv2d):
    """Computes `F.conv2d` as a layer."""


class BorrowedConv3d(Borrowed, nn.Conv3d):
    """Computes `F.conv3d` as a layer."""


class BorrowedLinear(Borrowed, nn.Linear):
    """Computes `F.linear` as a layer."""


class BorrowedMatmul(Borrowed, nn.Linear):
    """Computes `x @ matrix + bias` as a layer. Its parameter is the matrix `[K, N]`; its `weight`, the transpose."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`[N, K]`, a view of the parameter."""
        matrix = self._parameters["weight"]
        assert matrix is not None
        return matrix.t()


@torch.no_grad()
def turn(layer: BorrowedMatmul) -> None:
    """Makes `x @ matrix` a linear in place, with a parameter of its own `[N, K]` for its matrix `[K, N]`."""
    matrix = layer._parameters["weight"]
    assert matrix is not None
    layer.__class__ = BorrowedLinear  # type: ignore[assignment]
    layer._parameters["weight"] = nn.Parameter(matrix.t().contiguous(), matrix.requires_grad)


def borrow(op: str, weight: nn.Parameter, bias: nn.Parameter | None, geometry: dict[str, Any]) -> Borrowed:
    """Makes a layer that computes one functional call with these very Parameters.

    Args:
        op: "linear", "matmul", "conv1d", "conv2d" or "conv3d".
        weight: `[N, K]`, of a matmul `[K, N]`, or `[O, C / groups, ...]`.
        bias: `[N]` or `[O]`.
        geometry: stride, padding, dilation and groups of a conv, as given to the function.
    """
    shape = tuple(weight.shape)
    layer: Borrowed
    if op in ("linear", "matmul"):
        layer = BorrowedLinear(shape[1], shape[0], bias=bias is not None, device="meta")
        if op == "matmul":
            layer.__class__ = BorrowedMatmul  # type: ignore[assignment]
            layer.in_features, layer.out_features = shape
    else:
        conv = {"conv1d": BorrowedConv1d, "conv2d": BorrowedConv2d, "conv3d": BorrowedConv3d}[op]
        channels = shape[1] * geometry.get("groups", 1)
        layer = conv(channels, shape[0], shape[2:], bias=bias is not None, device="meta", **geometry)  # type: ignore[arg-type]
    layer._parameters["weight"], layer._parameters["bias"] = weight, bias
    layer.borrowed = ("weight",) if bias is None else ("weight", "bias")
    return layer
