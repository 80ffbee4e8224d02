"""Defines the tensors that converted layers pass on where floats are not needed: int8 codes, and deferred results.

Some operations run on the codes (`gs_algos.quant.integer.on_codes`). A sum is computed when something reads it, for a
layer straight to codes, in one pass. Every other operation sees the dequantized values.

Layers leave their codes and values with the channels last, which is fastest. The strides that such a tensor shows are
those that the float network's has, and in that order whatever is no layer of ours sees the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_algos.quant.integer.on_codes import ON_CODES, SPLITS, parts
from gs_algos.quant.memory_format import laid, strides_in, suggested
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.for_layers import OperationCall, Refusal, is_dense, noted, prepared_requantize, recording
from gs_kernels.runtime.torch_private import PLAIN, function_modes, is_composite, is_plain_call, make_wrapper

aten = torch.ops.aten
Like: TypeAlias = tuple[Any, Any, torch.dtype, torch.device]  # shape, strides, dtype, device

# give what a forward reads, and what only gradients read
_FIRST_OF_SEVERAL = {
    aten.max_pool2d_with_indices.default,
    aten.native_batch_norm.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
}
_ACTIVATION_OF = {call: name for name, activation in ACTIVATIONS.items() for call in activation.calls}


class VirtualTensor(Tensor):
    """Looks like a float tensor and stores none: NumPy, copies and files get plain values."""

    like: Like  # shape, strides, dtype and device that it shows, which take a tenth of the time to read here

    def __add__(self, other: Any) -> Any:
        """Adds without a walk through the dispatcher where that would come to the same; also called by `x + y`."""
        plain = type(other) in HANDED_ON and may_return_int8(self) and not function_modes()
        total = _deferred_sum(self, other) if plain else None
        return super().__add__(other) if total is None else total

    def dequantize(self) -> Tensor:
        """Returns the values, with the strides that the tensor shows."""
        raise AssertionError("every tensor that layers hand on has values")

    def values(self) -> Tensor:
        """Returns the values with the strides that they, or their codes, lie in."""
        raise AssertionError("every tensor that layers hand on has values")

    def codes_on(self, grid: Any) -> Tensor | None:
        """Returns int8 codes of the values on a grid; None where quantizing the values is better."""
        raise AssertionError("every tensor that layers hand on says so")

    def numpy(self, **kwargs: Any) -> Any:
        return dequantized(self).numpy(**kwargs)

    def tolist(self) -> Any:
        return dequantized(self).tolist()

    def data_ptr(self) -> int:
        raise RuntimeError(
            f"{type(self).__name__}: a tensor with memory is needed, got one whose values are not laid out; use x + 0"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return dequantized(self).__array__(*args, **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return dequantized(self).__dlpack__(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return dequantized(self).clone()  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dequantized(self).__reduce_ex__(protocol)


class QuantizedTensor(VirtualTensor):
    """Looks like a float tensor and holds int8 `codes` on the grid of `quantizer`, 128 lower for an unsigned grid.

    Args:
        codes: int8, any shape and strides.
        quantizer: the `StaticQuantizer` whose codes they are.
        dtype: of the dequantized values.
        strides: that the values have for whoever reads them; default: those of the codes.
    """

    codes: Tensor
    quantizer: Any

    @staticmethod
    def __new__(
        cls, codes: Tensor, quantizer: Any, dtype: torch.dtype, strides: tuple[int, ...] | None = None
    ) -> QuantizedTensor:
        return cls.of(codes, quantizer, (codes.shape, strides or codes.stride(), dtype, codes.device))

    @staticmethod
    def of(codes: Tensor, quantizer: Any, like: Like) -> QuantizedTensor:
        """Makes the tensor from what it shows."""
        self: QuantizedTensor = make_wrapper(QuantizedTensor, like[0], like[1], dtype=like[2], device=like[3])
        self.codes, self.quantizer, self.like = codes, quantizer, like
        if recording.calls is not None:
            recording.results.append(weakref.ref(self))
        return self

    def lay(self) -> Tensor:
        """Gives the codes the strides of the values, for good, and returns them."""
        self.codes = _laid(self.codes, self.stride())
        return self.codes

    def dequantize(self) -> Tensor:
        """Returns the values, `(code - zero) * scale`."""
        _refuse_recording("values are read")
        self.lay()
        return self.values()

    def values(self) -> Tensor:
        """Returns the values with the strides of the codes."""
        return prepared_requantize(self.quantizer.constants(), None, "none", self.like[2], None)(self.codes)

    def codes_on(self, grid: Any) -> Tensor:
        """Returns int8 codes of the values on another grid."""
        if grid is self.quantizer:
            return self.codes
        own = self.quantizer.constants()
        return prepared_requantize(own, None, "none", self.like[2], grid.constants())(self.codes)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({list(self.shape)}, {self.quantizer.scheme})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            return func.decompose(*args, **kwargs)
        if func is aten.add.Tensor and not kwargs:
            total = _deferred_sum(*args)
            return _on_values(func, args, kwargs) if total is None else total
        x = args[0] if args else None
        if isinstance(x, QuantizedTensor):
            if func in SPLITS:
                return parts(func, x, *args[1:], **kwargs)
            on_codes = ON_CODES.get(func)
            if on_codes is not None:
                y = on_codes(func, x, *args[1:], **kwargs)
                return y if recording.calls is None else _recorded_on_codes(func, x, args[1:], kwargs, y)
            if _is_mutable(func):  # PyTorch would return x as it was
                raise RuntimeError(
                    f"QuantizedTensor: {func} must not write into 8-bit codes, got it outside the traced forward "
                    "(a hook?); use the operation that returns a new tensor"
                )
        if func is aten.cat.default and _alike(x):
            return _cat(*args)
        return _on_values(func, args, kwargs)


class DeferredOutput(VirtualTensor):
    """Computes a result when something reads it: by then an add or an activation may have joined it.

    Args:
        run: `(residual, activation, grid) -> tensor`: the result, floats, or int8 codes on a grid; its `adds`,
            `activations` and `to_grid` say which of them it can do.
        like: shape, strides, dtype and device of the result.
        residual: to be added.
        activation: to be applied then.
    """

    _run: Any
    _residual: Tensor | None
    _activation: str
    _result: Tensor | None
    recorded: Tensor | None = None  # the plain tensor that this one stands for while a forward is recorded

    @staticmethod
    def __new__(cls, run: Any, like: Like, residual: Tensor | None = None, activation: str = "none") -> DeferredOutput:
        self: DeferredOutput = make_wrapper(DeferredOutput, like[0], like[1], dtype=like[2], device=like[3])
        self.like, self._run, self._residual, self._activation, self._result = like, run, residual, activation, None
        if recording.calls is not None:
            recording.results.append(weakref.ref(self))
        return self

    @staticmethod
    def of(result: Tensor, strides: tuple[int, ...]) -> DeferredOutput:
        """Wraps a computed result whose memory order differs from the strides that readers see."""
        y = DeferredOutput(None, (result.shape, strides, result.dtype, result.device))
        y._result = _unwrapped(result)
        return y

    def watch(self, wrap: Callable[[Any], Any]) -> None:
        """Puts what `wrap` makes of `run` in its place, for whoever measures; nothing if the result is there."""
        if self._result is None:
            self._run = wrap(self._run)

    def dequantize(self) -> Tensor:
        """Returns the values; computed once."""
        _refuse_recording("values are read")
        self._result = laid(self.values(), self.stride())
        return self._result

    def values(self) -> Tensor:
        """Returns the values with the strides they were computed in; computed once."""
        if self._result is None:
            self._result = _unwrapped(self._run(self._residual, self._activation, None))
            self._residual = None
        return self._result

    def codes_on(self, grid: Any, activation: str = "none") -> Tensor | None:
        """Computes int8 codes of the activated values on a grid; None where quantizing the values is better."""
        if self._result is not None or not self._run.to_grid:
            return None
        if activation != "none" and (self._activation != "none" or activation not in self._run.activations):
            return None
        codes: Tensor = self._run(self._residual, self._activation if activation == "none" else activation, grid)
        return codes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredOutput({list(self.shape)})"

    def _joined(self, func: Any, args: tuple[Any, ...]) -> tuple[Like, Tensor | None, str] | None:
        """Returns the (like, residual, activation) that make this result `func(*args)`; None if none do."""
        if self._result is not None or self._activation != "none":
            return None
        if func in (aten.add.Tensor, aten.add_.Tensor):
            other = args[1] if args[0] is self else args[0]
            free = self._run.adds and self._residual is None and _can_add(self, other)
            first = args[0] if isinstance(args[0], VirtualTensor) or is_dense(args[0]) else None
            # a sum has the strides of its first operand
            return (like_of(first), other, "none") if free and first is not None else None
        name = _ACTIVATION_OF.get(func, "")
        if name not in self._run.activations or (name == "relu6" and args[1:] != (0.0, 6.0)):
            return None
        return self.like, self._residual, name

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            return func.decompose(*args, **kwargs)
        mutable = _is_mutable(func)
        x = args[0] if isinstance(args[0], DeferredOutput) or mutable or len(args) < 2 else args[1]
        if isinstance(x, DeferredOutput):
            joined = None if kwargs else x._joined(func, args)
            if x.recorded is not None and func is aten.as_strided_.default and _is_as_it_lies(x, *args[1:]):
                return x  # pools give their results of one pixel other strides
            if mutable and x is args[0]:  # the result stands in the place of x, also where another reads it
                if joined is None and recording.calls is not None:
                    _recorded_in_place(func, x, args[1:], kwargs)
                elif joined is None:
                    func(
                        x.dequantize(),
                        *map(dequantized, args[1:]),
                        **{key: dequantized(value) for key, value in kwargs.items()},
                    )
                else:
                    x._residual, x._activation = joined[1:]
                return x
            if joined is not None:
                return DeferredOutput(x._run, *joined)
        return _on_values(func, args, kwargs)


def _unwrapped(y: Tensor) -> Tensor:
    """Returns what an output quantizer gave while a forward is recorded, and other results as they are."""
    return y.values() if type(y) is DeferredOutput else y


@cache
def _is_mutable(func: Any) -> bool:
    return bool(func._schema.is_mutable)


class _SumOfCodes:
    """Adds two quantized tensors, in the order and dtype in which floats are added."""

    adds = False
    activations = ("relu", "relu6")
    to_grid = True

    def __init__(self, a: QuantizedTensor, b: QuantizedTensor) -> None:
        self.a, self.b = a, b

    def __call__(self, residual: Tensor | None, activation: str, grid: Any) -> Tensor:
        a, b = self.a, self.b
        into = None if grid is None else grid.constants()
        add = prepared_requantize(a.quantizer.constants(), b.quantizer.constants(), activation, a.like[2], into)
        return add(a.codes, b.codes)


def _deferred_sum(a: Any, b: Any) -> DeferredOutput | None:
    """Defers a sum of codes, or one that a layer waits for, of which one tensor is ours; None for floats to add.

    Where one operand is codes, the network does not return the sum: it may keep the memory order of its operands.
    """
    codes = (type(a) is QuantizedTensor) + (type(b) is QuantizedTensor)
    if codes == 2:
        return DeferredOutput(_SumOfCodes(a, b), a.like) if _can_add(a, b) else None
    waiting = a if type(a) is DeferredOutput else b
    if type(waiting) is not DeferredOutput:
        return None
    joined = waiting._joined(aten.add.Tensor, (a, b))
    if joined is not None:
        return DeferredOutput(waiting._run, *joined)
    if not codes or not _can_add(a, b):
        return None
    x, y = a.values(), b.values()
    total = x + y
    if recording.calls is not None:
        recording.calls.append(OperationCall(torch.add, (x, y), {}, total))
    return DeferredOutput.of(total, a.like[1])


def _can_add(x: VirtualTensor, other: Any) -> bool:
    """Says whether other has the shape, dtype and device of x, and needs no gradient."""
    if not isinstance(other, Tensor) or other.requires_grad:
        return False
    mine, others = x.like, like_of(other)
    return mine[0] == others[0] and mine[2] is others[2] and mine[3] == others[3]


def _cat(tensors: Sequence[QuantizedTensor], axis: int = 0) -> QuantizedTensor:
    """Concatenates codes on one grid."""
    parts = tuple(t.codes for t in tensors)
    codes = torch.cat(parts, axis)
    if recording.calls is not None:
        recording.calls.append(OperationCall(lambda *parts: torch.cat(parts, axis), parts, {}, codes))
    formats = {suggested(t.shape, t.stride()) for t in tensors}
    into = formats.pop() if len(formats) == 1 else torch.contiguous_format
    return QuantizedTensor(codes, tensors[0].quantizer, tensors[0].dtype, strides_in(codes.shape, into))


def _alike(tensors: Any) -> bool:
    """Says whether all are quantized tensors on one grid."""
    return all(isinstance(t, QuantizedTensor) and t.quantizer.same_grid(tensors[0].quantizer) for t in tensors)


HANDED_ON = PLAIN | {QuantizedTensor, DeferredOutput}


def like_of(x: Tensor) -> Like:
    """Returns shape, strides, dtype and device."""
    return x.like if isinstance(x, VirtualTensor) else (x.shape, x.stride(), x.dtype, x.device)


def may_return_int8(x: Tensor) -> bool:
    """Says whether int8 or a deferred result may be returned for x: tracers, compilers and gradients need floats."""
    return is_plain_call(x, plain=HANDED_ON)


def dequantized(value: Any) -> Any:
    """Returns plain floats for the tensors of this file, also inside lists and tuples; other values as they are."""
    if isinstance(value, VirtualTensor):
        return value.dequantize()
    return type(value)(map(dequantized, value)) if type(value) in (list, tuple) else value


def values(x: Any) -> Any:
    """Returns plain floats in whatever strides they lie, which saves layers a copy that `dequantized` makes."""
    return x.values() if isinstance(x, VirtualTensor) else x


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes an operation on values; recorded, where that is wanted and its result follows from them alone."""
    if recording.calls is None:
        return func(*map(dequantized, args), **{key: dequantized(value) for key, value in kwargs.items()})
    learns = func is aten.native_batch_norm.default and args[5]
    if _is_mutable(func) or learns or torch.Tag.nondeterministic_seeded in func.tags:
        _refuse_recording(str(func))
    given, named = tuple(map(laid_values, args)), {key: laid_values(value) for key, value in kwargs.items()}
    y = func(*given, **named)
    if func in _FIRST_OF_SEVERAL:
        recording.calls.append(OperationCall(lambda *args: func(*args)[0], given, named, y[0]))
        return plain(y[0], y[0].stride()), *y[1:]
    if type(y) is not Tensor:
        _refuse_recording(f"{func} gives no tensor")
        return y
    recording.calls.append(OperationCall(func, given, named, y))
    return plain(y, y.stride())


def _recorded_in_place(func: Any, x: DeferredOutput, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Writes into the values of x; recorded, where it was a recorded operation that made them."""
    assert recording.calls is not None
    first = x._result = x.recorded = laid_values(x)
    given, named = tuple(map(laid_values, args)), {key: laid_values(value) for key, value in kwargs.items()}
    own = first.untyped_storage().data_ptr()
    made = [call for call in recording.calls if not isinstance(call, Refusal)]
    # what starts with a view was there before, such as a part of the network's input
    whole = next((call for call in made if call.y.untyped_storage().data_ptr() == own), None)
    reads = whole.args if isinstance(whole, OperationCall) else ()
    old = any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == own for t in reads)
    if whole is None or old or torch.Tag.nondeterministic_seeded in func.tags:
        _refuse_recording(str(func))
    func(first, *given, **named)
    recording.calls.append(OperationCall(func, (first, *given), named, first))


def _is_as_it_lies(x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Says whether a tensor has this shape and, but for axes of size 1, these strides."""
    same = (n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))
    return tuple(x.shape) == tuple(shape) and all(same)


def laid_values(value: Any) -> Any:
    """Does as `dequantized` for an operation that is recorded, with the copy that gives values their strides."""
    if isinstance(value, VirtualTensor):
        return _laid(value.values(), value.stride())
    return type(value)(map(laid_values, value)) if type(value) in (list, tuple) else value


def on_values(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Computes what follows from the values of x alone, as a part of a recording."""
    y = noted(operation, laid_values(x))
    return y if recording.calls is None else plain(y, y.stride())


def plain(y: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Returns what a layer or operation gives as a plain tensor with these strides.

    While a forward is recorded a tensor stands for it that sees what becomes of its values.
    """
    y = _laid(_unwrapped(y), strides)
    if recording.calls is None:
        return y
    stands = DeferredOutput.of(y, strides)
    stands.recorded = y
    return stands


def _laid(y: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Does as `laid`; a copy is recorded."""
    copied = laid(y, strides)
    if copied is not y and recording.calls is not None:
        recording.calls.append(OperationCall(laid, (y, strides), {}, copied))
    return copied


def _recorded_on_codes(func: Any, x: QuantizedTensor, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    """Records an operation on codes that gave y."""
    on_codes, quantizer, like = ON_CODES[func], x.quantizer, x.like
    result = y[0] if type(y) is tuple else y
    is_codes = type(result) is QuantizedTensor

    def again(codes: Tensor) -> Tensor:
        y = on_codes(func, QuantizedTensor.of(codes, quantizer, like), *args, **kwargs)
        result = y[0] if type(y) is tuple else y
        return result.codes if is_codes else result  # type: ignore[no-any-return]

    if not (is_codes or type(result) is Tensor):
        _refuse_recording(f"{func} of codes")
        return y
    assert recording.calls is not None
    recording.calls.append(OperationCall(again, (x.codes,), {}, result.codes if is_codes else result))
    return y if is_codes else plain(result, result.stride())


def _refuse_recording(why: str) -> None:
    if recording.calls is not None:
        recording.calls.append(Refusal(why))
