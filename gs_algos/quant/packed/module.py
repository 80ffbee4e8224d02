"""Defines the base of layers with a packed weight: tensors are buffers, canonical in state_dicts, planar on a GPU.

The tensors keep their dtypes whatever the layer is cast to: `.to(dtype)` changes what the layer computes in, never what
it stores. A layer that is tied to another (a language model's head to its embedding) has no tensors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from gs_algos.core.tensor_rules import FINITE, NOT_NEGATIVE, NOT_ZERO, POSITIVE, Must, Rules
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.fixed_dtype import FixedDtypeBuffers
from gs_algos.quant.integer.prepared_call import PREPARED
from gs_kernels import PackedWeight, dequantize_packed, pack_codes, repack, unpack_codes
from gs_kernels.pack.layouts import CANONICAL, PLANAR, codes_shape
from gs_kernels.pack.serialize import loaded_scale, stored_scale
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.torch_private import autocasts

WEIGHT_TENSORS = ("codes", "scale", "zero", "levels", "divisor")
MADE = ("_packed_cache", "_packed_scale", PREPARED)  # attributes made of a layer's tensors
EXPONENTS = Must("exponents below 255, which is NaN", lambda t: t < 255)  # powers of two, as bytes
SIGNS = {"any": FINITE, "positive": POSITIVE, "not negative": NOT_NEGATIVE, "not zero": NOT_ZERO}
BITS = (1, 2, 4, 8)
SCALE_DTYPES = ("float32", "float16", "bfloat16", "float64")
SCALES_8 = {"float8_e8m0fnu": False, "float8_e4m3fn": True}  # of 4-bit floats: whether they come with divisors
KERNEL_DEVICES = ("cuda", "cpu") if INTERPRET else ("cuda",)  # where kernels run, which read the planar layout


@dataclass(frozen=True)
class PackedFormat:
    """Describes a packed weight without its values, in plain JSON values.

    Args:
        zero: the zero point of all groups, or None if each has its own.
        scale_dtype: of the scales and zero points, e.g. "float16".
        levels: whether there is a table of levels.
        divisors: how many numbers the scales of nvfp4 are divided by; else 0.
    """

    bits: int
    shape: tuple[int, int]
    group_size: int
    zero: float | None
    scale_dtype: str
    levels: bool = False
    divisors: int = 0

    @staticmethod
    def of(weight: PackedWeight) -> PackedFormat:
        return PackedFormat(
            bits=weight.bits,
            shape=weight.shape,
            group_size=weight.group_size,
            zero=None if isinstance(weight.zero, Tensor) else float(weight.zero),
            scale_dtype=str(weight.scale.dtype).removeprefix("torch."),
            levels=weight.levels is not None,
            divisors=0 if weight.divisor is None else weight.divisor.shape[0],
        )

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PackedFormat:
        """Reads the format from plain JSON values.

        Raises:
            ValueError: if they describe no packed weight.
        """
        try:
            format = PackedFormat(**{**data, "shape": tuple(data["shape"])})
            whole = all(type(n) is int and 0 < n < 2**31 for n in (format.bits, *format.shape, format.group_size))
            right = (
                whole
                and len(format.shape) == 2
                and format.bits in BITS
                and format.shape[1] % format.group_size == 0
                and (format.scale_dtype in SCALE_DTYPES or format._of_floats())
                and (format.zero is None or (type(format.zero) in (int, float) and math.isfinite(format.zero)))
                and isinstance(format.levels, bool)
                and (format.divisors == 0 or format.scale_dtype in SCALES_8)
            )
        except (TypeError, KeyError):
            right = False
        if not right:
            raise ValueError(f"PackedFormat: it must be the format of a packed weight, got {data!r:.200}")
        return format

    def _of_floats(self) -> bool:
        """Says whether it is the format of 4-bit floats with 8-bit scales."""
        divided = SCALES_8.get(self.scale_dtype)
        many = type(self.divisors) is int and self.divisors > 0 and self.shape[0] % self.divisors == 0
        right = divided is not None and self.bits == 4 and self.levels is True and self.zero == 0
        return right and (many if divided else self.divisors == 0)

    def to_dict(self) -> dict[str, Any]:
        data = {**asdict(self), "shape": list(self.shape)}
        if not self.divisors:
            del data["divisors"]  # as versions before know it
        return data

    @property
    def nbytes(self) -> int:
        return self.empty("meta").nbytes

    def empty(self, device: torch.device | str) -> PackedWeight:
        """Makes an unfilled canonical weight of this format."""
        n, k = self.shape
        grouped = (n, k // self.group_size)
        dtype = getattr(torch, self.scale_dtype)
        return PackedWeight(
            codes=torch.empty(codes_shape(CANONICAL, n, k, self.bits), dtype=torch.uint8, device=device),
            scale=torch.empty(grouped, dtype=dtype, device=device),
            zero=torch.empty(grouped, dtype=dtype, device=device) if self.zero is None else self.zero,
            levels=torch.empty(2**self.bits, dtype=torch.float32, device=device) if self.levels else None,
            bits=self.bits,
            shape=self.shape,
            group_size=self.group_size,
            divisor=torch.empty(self.divisors, dtype=torch.float32, device=device) if self.divisors else None,
        )


class Packed(FixedDtypeBuffers, OffFastPath):
    """Holds a frozen packed weight `[N, K]`; the base of all packed layers.

    Args:
        weight: the tensors to hold, in either layout; or another packed layer, whose weight this one then uses too.
        dtype: that the float layer had: of `.weight`, and of what an embedding returns.
    """

    fixed_dtype: ClassVar[tuple[str, ...]] = WEIGHT_TENSORS
    signs: str = "any"  # that its scales can have, a key of SIGNS, where whoever made them knows
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    levels: Tensor | None
    divisor: Tensor | None
    _packed_cache: PackedWeight | None = None  # what `packed` gave last, while the buffers are the same
    _packed_scale: Tensor | None = None  # the buffer of its scales, which may be a view of it

    def __init__(self, weight: PackedWeight | Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # in a tuple: a module attribute would register the other layer a second time
        self._tied_to = (weight,) if isinstance(weight, Packed) else ()
        held = weight.packed if isinstance(weight, Packed) else weight
        self.bits, self.shape, self.group_size = held.bits, held.shape, held.group_size
        self._zero = None if isinstance(held.zero, Tensor) else float(held.zero)
        tensors = {} if self._tied_to else tensors_of(held)
        for part in WEIGHT_TENSORS:
            self.register_buffer(part, tensors.get(part))
        self.arrange()

    def state_rules(self) -> Rules:
        # the zero point of GPTQ may be one beyond the codes
        scale = self.scale
        return {
            "scale": EXPONENTS if scale is not None and scale.dtype == torch.uint8 else SIGNS[self.signs],
            "zero": self._zero_rule(-1, 2**self.bits),
            "levels": FINITE,
            "divisor": POSITIVE,
            "codes": self._code_rule(),
        }

    def _zero_rule(self, low: int, high: int) -> Must:
        return Must(f"in {low}..{high}", lambda t: (t >= low) & (t <= high))

    def _code_rule(self) -> Must:
        used = self.shape[1] * self.bits % 8  # bits of a row's last byte

        def holds(codes: Tensor) -> Tensor:
            right = torch.ones_like(codes, dtype=torch.bool)
            if used:
                right[:, -1] = codes[:, -1] >> used == 0
            return right

        return Must(f"0 behind the last of {self.shape[1]} codes of a row", holds)

    @property
    def tied(self) -> bool:
        """Says whether the weight belongs to another layer."""
        return bool(self._tied_to)

    @property
    def owner(self) -> Packed:
        """Returns the layer whose weight this one uses: itself, if it is not tied."""
        return self._tied_to[0].owner if self._tied_to else self

    @property
    def packed(self) -> PackedWeight:
        """Returns the weight as the ops take it, in the layout that the device reads. Shares memory with the layer."""
        if self._tied_to:
            return self._tied_to[0].packed
        if torch.compiler.is_compiling():
            return self._make_packed()
        own, held = self._buffers, self._packed_cache
        if held is not None and held.codes is own["codes"] and self._packed_scale is own["scale"]:
            zero = own["zero"] if self._zero is None else self._zero
            same = held.bits == self.bits and held.shape == self.shape and held.group_size == self.group_size
            same = same and held.zero is zero and held.levels is own["levels"] and held.divisor is own["divisor"]
            if same and held.layout == (PLANAR if held.codes.dtype is torch.int16 else CANONICAL):
                return held
        held = self._make_packed()
        # not those of a tracer, which puts its own tensors in the place of buffers for a while
        self.__dict__["_packed_cache"] = held if type(held.codes) is Tensor else None
        self.__dict__["_packed_scale"] = own["scale"]
        return held

    def _make_packed(self) -> PackedWeight:
        codes, scale = self.codes, self.scale
        assert codes is not None and scale is not None
        scale, divisor = loaded_scale(scale), self.divisor
        zero = self.zero if self._zero is None else self._zero
        assert zero is not None
        layout = layout_of(codes)
        return PackedWeight(codes, scale, zero, self.levels, self.bits, self.shape, self.group_size, layout, divisor)

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized weight `[N, K]`, no parameter; made anew at each access, as large as the float one.

        For looking at values; nothing that is written into it is kept. Multiply with the layer itself instead.
        """
        return dequantize_packed(self.packed, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight; 0 for a layer that is tied to another."""
        return 0 if self._tied_to else self.packed.nbytes

    def keep_rows(self, name: str, value: int) -> None:
        """Refuses to change the number of rows: a packed weight cannot be resized.

        Raises:
            ValueError: if the value is another.
        """
        if value != self.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: {name} must stay {self.shape[0]}, got {value}; "
                "resize the float model, then pack it"
            )

    def path(self) -> str:
        """Says which arithmetic the layer runs in, and why."""
        return "float x packed codes"

    def arrange(self) -> None:
        """Gives the codes the layout that their device reads best. Needed after tensors were assigned by hand."""
        codes = self.codes
        if codes is None or codes.is_meta:
            return
        wanted = PLANAR if runs_kernels(codes.device) else CANONICAL
        if layout_of(codes) != wanted:
            self.codes = repack(self.packed, wanted).codes

    def __getstate__(self) -> dict[str, Any]:
        """Leaves what is made of its tensors out of copies and files, which make their own."""
        return {key: value for key, value in self.__dict__.items() if key not in MADE}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for key in MADE:  # whose tensors would outlive a move to another device
            self.__dict__.pop(key, None)
        device = None if self.codes is None else self.codes.device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        super()._apply(fn, recurse)
        self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is not None:
            destination[prefix + "codes"] = repack(self.packed, CANONICAL).codes

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        given = {part: state_dict.get(prefix + part) for part in WEIGHT_TENSORS}
        for part in ("scale", "zero", "levels", "divisor"):
            own, new = self._buffers[part], given[part]
            if own is not None and isinstance(new, Tensor) and new.dtype != own.dtype and new.is_floating_point():
                self._buffers[part] = torch.empty_like(own, dtype=new.dtype)  # a cast would change the values
        new = given["codes"]
        planar = self.codes is not None and layout_of(self.codes) == PLANAR
        canonical = (torch.uint8, codes_shape(CANONICAL, *self.shape, self.bits))
        if planar and isinstance(new, Tensor) and (new.dtype, tuple(new.shape)) == canonical:
            codes = unpack_codes(new, self.bits, self.shape)
            state_dict = {**state_dict, prefix + "codes": pack_codes(codes, self.bits, PLANAR)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.arrange()

    def extra_repr(self) -> str:
        zero = "zero per group" if self._zero is None else f"zero={self._zero:g}"
        return f"bits={self.bits}, group_size={self.group_size}, {zero}{', tied' if self.tied else ''}"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast multiplies x in; None if it is off, or the device has none (meta)."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not autocasts():
        return None
    kind = x.device.type
    # Dynamo of PyTorch 2.11 cannot trace the question whether a device has autocast: those it compiles for do
    exists = kind != "meta" and (compiling or torch.amp.is_autocast_available(kind))
    return torch.get_autocast_dtype(kind) if exists and torch.is_autocast_enabled(kind) else None


def zero_as(weight: PackedWeight, constant: bool) -> PackedWeight:
    """Stores one zero point for all (they are equal), or a tensor of them, as the scheme says.

    Values decide nothing about the form, so that a layer that is yet to be filled can be built without them.
    """
    zero = weight.zero
    if constant and isinstance(zero, Tensor):
        return replace(weight, zero=float(zero.flatten()[0]))
    if not constant and not isinstance(zero, Tensor):
        return replace(weight, zero=torch.full_like(weight.scale, zero))
    return weight


def tensors_of(weight: PackedWeight) -> dict[str, Tensor]:
    """Returns the tensors of a packed weight under the names, and in the dtypes, that they have in a state_dict."""
    tensors = {part: value for part in WEIGHT_TENSORS if isinstance(value := getattr(weight, part), Tensor)}
    return {**tensors, "scale": stored_scale(weight.scale)}


def runs_kernels(device: torch.device) -> bool:
    """Says whether Triton's kernels run on a device: a GPU, or a CPU in Triton's interpreter."""
    return device.type in KERNEL_DEVICES


def layout_of(codes: Tensor) -> str:
    """Tells the layout of packed codes from their dtype."""
    return PLANAR if codes.dtype == torch.int16 else CANONICAL
