"""Rotates what a module reads or returns, as it runs: hooks that a packed network takes with it.

A hook stays where it is when its layer is rounded or packed. What it does is a `Rotation`, which files hold as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_kernels import hadamard, hadamard_block
from gs_kernels.runtime.torch_private import is_eager

SIDES = ("input", "output")


@dataclass(frozen=True)
class Rotation:
    """Describes an orthogonal map R of rows `[..., K]`: `x @ R = (x * signs) @ H / sqrt(block)`, H in blocks.

    Args:
        block: order of the Hadamard matrices.
        signs: "+" or "-" for each of the K channels; "" for no signs.
        transposed: whether it is `x @ R^T`, which takes x @ R back.
        keeps_mean: `x @ R = x @ H^T * signs @ H / block` instead: with "+" first in each block it leaves rows of equal
            numbers as they are, so that it passes through a LayerNorm. It is its own inverse.
    """

    block: int
    signs: str = ""
    transposed: bool = False
    keeps_mean: bool = False

    @classmethod
    def drawn(cls, k: int, keeps_mean: bool = False, seed: int = 0) -> Rotation:
        """Draws the signs of one for rows of K channels."""
        block = hadamard_block(k)
        bits = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        signs = ["+" if bit or (keeps_mean and i % block == 0) else "-" for i, bit in enumerate(bits)]
        return cls(block, "".join(signs), False, keeps_mean)

    @property
    def back(self) -> Rotation:
        """Returns the inverse."""
        return Rotation(self.block, self.signs, not self.transposed and not self.keeps_mean, self.keeps_mean)

    def sign_tensor(self) -> Tensor | None:
        """Returns the signs, `[K]` int8, on the CPU; None without."""
        if not self.signs:
            return None
        return torch.tensor([1 if sign == "+" else -1 for sign in self.signs], dtype=torch.int8, device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the rows of x, `[..., K]`."""
        signs = self.sign_tensor()
        return self.of(x, None if signs is None else signs.to(x.device))

    def of(self, x: Tensor, signs: Tensor | None) -> Tensor:
        """Does the same with the tensor of the signs, which is on the device of x."""
        if self.keeps_mean:
            return hadamard(hadamard(x, block=self.block, transposed=True), signs, block=self.block)
        return hadamard(x, signs, block=self.block, transposed=self.transposed)


class RotationHook:
    """Rotates the first tensor that a module is given, or gives, depending on how it is registered."""

    def __init__(self, rotation: Rotation, side: str) -> None:
        self.rotation, self.side, self.signs = rotation, side, rotation.sign_tensor()

    def rotate(self, x: Tensor) -> Tensor:
        signs = self.signs
        if signs is not None and signs.device != x.device:
            signs = signs.to(x.device)
            if is_eager(x) and not x.is_meta:
                self.signs = signs
        return self.rotation.of(x, signs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if self.side == "output":
            given = output[0]
            return (self.rotate(given[0]), *given[1:]) if isinstance(given, tuple) else self.rotate(given)
        if args:
            return (self.rotate(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self.rotate(kwargs[name])}


def install_rotation(module: nn.Module, side: str, rotation: Rotation) -> Any:
    """Has the module rotate what it reads ("input") or returns ("output"); returns the handle that removes it."""
    hook = RotationHook(rotation, side)
    if side == "input":
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


def rotations_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns what rotates in a network, as JSON holds it: name of a module -> side -> fields of its `Rotation`."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, RotationHook):
                found.setdefault(name, {})[hook.side] = asdict(hook.rotation)
    return found


def checked_rotations(data: Any, who: str) -> dict[str, dict[str, Rotation]]:
    """Reads what `rotations_of` gave.

    Raises:
        ValueError: if it is something else.
    """
    found: dict[str, dict[str, Rotation]] = {}
    try:
        for name, sides in data.items():
            for side, fields in sides.items():
                rotation = Rotation(**fields)
                right = side in SIDES and type(rotation.block) is int and isinstance(rotation.signs, str)
                right = right and rotation.block > 0 and hadamard_block(rotation.block) == rotation.block
                if not right or set(rotation.signs) - {"+", "-"} or len(rotation.signs) % rotation.block:
                    raise TypeError
                found.setdefault(str(name), {})[side] = rotation
    except (TypeError, AttributeError):
        raise ValueError(
            f"{who}: rotations must map modules to what they rotate, got {data!r:.80}; it is damaged, or a newer "
            "golden-stick wrote it"
        ) from None
    return found


def install_rotations(model: nn.Module, rotations: Mapping[str, Mapping[str, Rotation]]) -> None:
    """Gives a network the rotations of another."""
    for name, sides in rotations.items():
        for side, rotation in sides.items():
            install_rotation(model.get_submodule(name), side, rotation)
