"""Finds the residual stream of a network: the norms that read it, the linears behind those, and what writes to it.

By the tensors that go from module to module and by trying what norms compute, not by the names of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.compare import relative_error
from gs_algos.ptq.blocks import Call, first_tensor, recorded
from gs_algos.ptq.streams import without_cache
from gs_algos.ptq.transforms.producer import (
    OFFSETS,
    divide_output,
    has_outputs,
    is_leaf,
    is_norm,
    multiply_input,
    probe_scale,
    restored,
    shared_parameters,
)
from gs_algos.quant.packed.packable import CONVS, base_of, matrix_of
from gs_algos.quant.rotation import Rotation
from gs_kernels import hadamard_block

LEAST = 4  # channels that are mixed at least
TOLERANCE = 1e-5
OUT = "leave rotate out"


@dataclass(frozen=True)
class ResidualNorm:
    """Describes a norm that reads the residual stream.

    Args:
        readers: linears that read what it returns.
        offset: its gain is `weight + offset`.
        keeps_mean: whether it takes the mean away, like LayerNorm.
        alone: why the gain cannot go into the readers; "" if it can.
    """

    name: str
    readers: tuple[str, ...]
    offset: float
    keeps_mean: bool
    alone: str = ""


@dataclass(frozen=True)
class Residual:
    """Describes the residual stream of a network, of `width` channels.

    Args:
        norms: whose gains can go into their readers, in the order they run in.
        last: the norm behind all writers whose gain cannot; None if there is none.
        writers: linears whose outputs are added to it.
        stem: an embedding or linear whose very output it begins with, or "".
        entry: the module and the side, "output" or "input", where it begins, if it has no such stem.
    """

    width: int
    norms: tuple[ResidualNorm, ...]
    last: ResidualNorm | None
    writers: tuple[str, ...]
    stem: str
    entry: tuple[str, str]

    @property
    def keeps_mean(self) -> bool:
        every = self.norms if self.last is None else (*self.norms, self.last)
        return any(norm.keeps_mean for norm in every)

    @property
    def rotation(self) -> Rotation:
        return Rotation.drawn(self.width, self.keeps_mean)


def find_residual(model: nn.Module, example_inputs: Inputs, who: str) -> Residual:
    """Returns the residual stream; changes nothing.

    Raises:
        ValueError: if the network has none that can be rotated, with the reason.
    """
    modules = dict(model.named_modules())
    with recorded(modules.items()) as calls, evaluating(model), without_cache(model):
        run(model, example_inputs, who)
    linears = {name: call for name, call in calls.items() if is_linear(modules[name])}
    from_linears = {id(call.given): name for name, call in linears.items()}
    found = _norms(modules, calls)
    read = {id(call.first) for call in linears.values()}
    plain = {name: call for name, call in found.items() if id(call.first) not in from_linears or id(call.given) in read}
    widths = Counter(_width(call) for call in plain.values() if id(call.given) in read)
    if not widths:
        raise ValueError(
            f"{who}: rotate needs norms with a gain in front of the layers that read the residual stream, got "
            f"{type(model).__name__} without; {OUT}"
        )
    width = max(widths, key=lambda w: (widths[w], w))
    if hadamard_block(width) < LEAST:
        raise ValueError(
            f"{who}: rotate needs a residual stream whose width the order of a Hadamard matrix divides, {LEAST} or "
            f"more, got {width} channels; {OUT}"
        )
    order = sorted((call for call in plain.values() if _width(call) == width), key=lambda call: call.begun)
    shared = shared_parameters(model)
    norms = [_residual_norm(call, modules, calls, linears, shared, who) for call in order]
    while len(norms) > 1 and norms[0].alone:  # what it returns is where the stream begins
        norms, order = norms[1:], order[1:]
    reads = {name for norm in norms for name in norm.readers}
    for name, call in found.items():
        before = from_linears.get(id(call.first), "")
        if name not in plain and _width(call) == width and before not in reads:
            raise ValueError(
                f"{who}: rotate needs writers that are added as they are, got {name} behind {before}; {OUT}"
            )
    begun, ended = order[0].begun, order[-1].begun
    writers = [
        call
        for name, call in sorted(linears.items(), key=lambda item: item[1].begun)
        if begun < call.begun < ended and has_outputs(modules[name], width) and name not in reads
    ]
    for call in writers:
        if call.count > 1 or _is_shared(modules[call.name], shared):
            raise ValueError(f"{who}: rotate needs writers of their own, got {call.name}, which is used twice; {OUT}")
    if not writers:
        raise ValueError(f"{who}: rotate needs linears that write to the residual stream, got none; {OUT}")
    inner, last = list(norms), None
    if norms[-1].alone and order[-1].begun > max(call.ended for call in writers):
        last = inner.pop()
        behind = [
            name
            for name, call in linears.items()
            if call.begun > order[-1].ended and call.count == 1 and not _is_shared(modules[name], shared)
        ]
        behind = [name for name in behind if _weight_of(modules[name]).shape[1] == width]
        if behind and _is_read_by(model, example_inputs, last, behind, who):
            inner.append(replace(last, readers=tuple(behind), alone=""))
            last = None
    for norm in inner:
        if norm.alone:
            raise ValueError(
                f"{who}: rotate needs norms that only linears of their own read, got {norm.name}: {norm.alone}; {OUT}"
            )
    stem, entry = _entry(order[0], modules, calls, shared, who)
    return Residual(width, tuple(inner), last, tuple(call.name for call in writers), stem, entry)


def is_linear(module: nn.Module) -> bool:
    """Says whether a module is a linear whose weight is plain."""
    base = base_of(module)
    return (
        base is not None
        and base is not nn.Embedding
        and base not in CONVS
        and module._parameters.get("weight") is not None
    )


def _weight_of(layer: Any) -> Tensor:
    """Views the weight of a linear as `[N, K]`."""
    return matrix_of(layer, layer.weight.detach())


def _width(call: Call) -> int:
    return 0 if call.first is None else call.first.shape[-1]


def _norms(modules: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> dict[str, Call]:
    """Returns the calls of modules that may be norms: a gain for each channel of the tensor they get and give."""
    found = {}
    for name, call in calls.items():
        x, y = call.first, call.given
        if x is None or y is None or not x.is_floating_point() or x.dim() < 2 or x.shape != y.shape:
            continue
        if is_norm(modules[name], x.shape[-1]):
            found[name] = call
    return found


def _is_shared(module: nn.Module, shared: Collection[int]) -> bool:
    return any(id(p) in shared for p in module.parameters(recurse=False))


def _residual_norm(
    call: Call,
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    linears: Mapping[str, Call],
    shared: Collection[int],
    who: str,
) -> ResidualNorm:
    module = modules[call.name]
    kind = norm_kind(module, _width(call))
    if kind is None or call.others or call.count > 1 or _is_shared(module, shared):
        raise ValueError(
            f"{who}: rotate needs norms that are RMSNorm or LayerNorm with a gain, called once, got {call.name}, a "
            f"{type(module).__name__}; {OUT}"
        )
    readers = [name for name, one in linears.items() if one.first is call.given]
    others = [
        name
        for name, one in calls.items()
        if name not in readers and is_leaf(modules[name]) and any(t is call.given for t in (one.first, *one.others))
    ]
    alone = ""
    if others:
        alone = f"{others[0]} reads it, too"
    elif not readers:
        alone = "no linear reads it"
    elif name := next((name for name in readers if _is_shared(modules[name], shared)), ""):
        alone = f"the weight of {name} is used twice"
    elif name := next((name for name in readers if linears[name].count > 1), ""):
        alone = f"{name} is called more than once"
    return ResidualNorm(call.name, tuple(readers), *kind, alone)


def _is_read_by(model: nn.Module, example_inputs: Inputs, norm: ResidualNorm, linears: Sequence[str], who: str) -> bool:
    """Says whether all that reads a norm are these linears: if it divides and they multiply, outputs stay the same."""
    module, readers = model.get_submodule(norm.name), [model.get_submodule(name) for name in linears]
    gain: Any = module._parameters["weight"]
    scale = probe_scale(len(gain), gain.device)
    with torch.no_grad(), evaluating(model), without_cache(model):
        want = first_tensor(run(model, example_inputs, who))
        with restored([module, *readers]):
            divide_output(module, scale, norm.offset)
            for layer in readers:
                multiply_input(layer, scale)
            got = first_tensor(run(model, example_inputs, who))
    return want is not None and got is not None and _agree(got, want)


def norm_kind(module: nn.Module, width: int) -> tuple[float, bool] | None:
    """Returns the offset of a norm's gain, and whether it takes the mean away; None if it is no such norm."""
    weight: Any = module._parameters["weight"]
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(16, width, generator=generator, dtype=torch.float32, device="cpu").to(weight)
    with torch.no_grad(), evaluating(module):
        want = module(x)
        for offset in OFFSETS:
            gain, bias = weight.detach() + offset, module._parameters.get("bias")
            shift = 0.0 if bias is None else bias.detach().clone()
            with restored([module]):
                without_gain(module, offset)
                plain = module(x)
                if not _agree(plain * gain + shift, want):
                    continue
                for keeps_mean in (False, True):
                    rotation = Rotation.drawn(width, keeps_mean)
                    if _agree(module(rotation(x)), rotation(plain)):
                        return offset, keeps_mean
    return None


@torch.no_grad()
def without_gain(module: nn.Module, offset: float) -> None:
    """Makes the gain of a norm 1, and its shift 0."""
    module._parameters["weight"].fill_(1 - offset)  # type: ignore[union-attr]
    bias = module._parameters.get("bias")
    if bias is not None:
        bias.zero_()


def _agree(got: Tensor, want: Tensor) -> bool:
    return relative_error(got, want) <= max(TOLERANCE, 4 * torch.finfo(want.dtype).eps)


def _entry(
    first: Call, modules: Mapping[str, nn.Module], calls: Mapping[str, Call], shared: Collection[int], who: str
) -> tuple[str, tuple[str, str]]:
    """Returns the layer whose very output the stream begins with, if its weight is its own, or else where it begins."""
    x = first.first
    makers = [name for name, call in calls.items() if call.given is x and call.count == 1 and call.ended < first.begun]
    for name in makers:
        module = modules[name]
        if (base_of(module) is nn.Embedding or is_linear(module)) and not _is_shared(module, shared):
            return name, ("", "")
    if makers:
        return "", (makers[-1], "output")
    above = [name for name, call in calls.items() if name and call.first is x and first.name.startswith(f"{name}.")]
    above = [name for name in above if calls[name].count == 1]
    if not above:
        raise ValueError(
            f"{who}: rotate needs a module that returns what the residual stream begins with, or holds all that reads "
            f"it, got none in front of {first.name}; {OUT}"
        )
    return "", (min(above, key=lambda name: calls[name].begun), "input")
