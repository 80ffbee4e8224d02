"""Defines the modules that fake-quantize one tensor: a weight, whose range is read in each forward, or an activation.

An activation quantizer uses the range of the previous steps and collects the extremes of this one in `pending`, in the
same pass. `update_ranges` moves them into the range, for all quantizers of a network at once, between two steps. So the
forward has no host sync, can be run twice (gradient checkpointing) with the same result, and a step has one collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gs_algos.core.tensor_rules import FINITE, NOT_NEGATIVE, POSITIVE, Rules, whole_within
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.ranges import clip_ratio, search_range
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import PerTensor, choose_qparams, dynamic_fake_quant, fake_quant, minmax, observe_fake_quant
from gs_kernels.runtime.torch_private import foreach_add_, foreach_copy_

STATE = ("scale", "zero", "clip", "range")  # fp32 whatever the model is cast to
WIDEST = torch.finfo(torch.float32).max / 2  # end of a range that is still tracked: its double is finite
SMALLEST_SCALE = 2.0**-40  # a learnt step is clamped to this after each optimizer step, so that it stays positive


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """Returns the value, bit for bit, with its gradient multiplied by `factor` (LSQ, arXiv:1902.08153, section 2.2)."""
    part = value * factor
    return value.detach() + (part - part.detach())


def round_straight_through(value: Tensor) -> Tensor:
    return value + (value.round() - value).detach()


class Quantizer(nn.Module, OffFastPath):
    """Rounds on a grid whose state is fp32 whatever the model is cast to; a gate delays rounding, scales may be learnt.

    State: `scale [C]`, `zero [C]` fp32, real = (q - zero) * scale; parameters where the scheme says `lsq`.
    """

    gate: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, scheme: Scheme, n_scales: int, device: torch.device, delayed: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("gate", torch.zeros(1, dtype=torch.bool, device=device) if delayed else None)
        scale, zero = (torch.full((n_scales,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        if scheme.learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        if scheme.learned and not scheme.symmetric:
            self.zero = nn.Parameter(zero)
        else:
            self.register_buffer("zero", zero)

    def set_range(self, x_min: Tensor, x_max: Tensor) -> None:
        """Sets scale and zero point from a range, `[C]` each."""
        scale, zero = self._qparams(x_min, x_max)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero.copy_(zero)

    def state_rules(self) -> Rules:
        if self.scheme.learned:  # an optimizer may have moved them anywhere
            return {"scale": FINITE, "zero": FINITE}
        return {"scale": POSITIVE, "zero": whole_within(self.scheme.qmin, self.scheme.qmax)}

    def grid(self) -> tuple[Tensor, Tensor]:
        """Returns (scale, zero) `[C]` as the forward uses them, detached: a learnt zero point is rounded."""
        zero = self.zero.detach()
        return self.scale.detach(), zero.round() if isinstance(self.zero, nn.Parameter) else zero

    def _qparams(self, x_min: Tensor, x_max: Tensor) -> tuple[Tensor, Tensor]:
        s = self.scheme
        return choose_qparams(x_min, x_max, qmin=s.qmin, qmax=s.qmax, symmetric=s.symmetric)

    def _learnt(self, elements_per_scale: int) -> tuple[Tensor, Tensor]:
        factor = 1.0 / math.sqrt(max(elements_per_scale, 1) * max(self.scheme.qmax, 1))
        zero = self.zero
        if isinstance(zero, nn.Parameter):
            zero = round_straight_through(scale_gradient(zero, factor))
        return scale_gradient(self.scale, factor), zero

    def _gated(self, quantized: Tensor, x: Tensor) -> Tensor:
        return quantized if self.gate is None else torch.where(self.gate, quantized, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        before = {name: t.detach() for name in STATE if isinstance(t := getattr(self, name, None), Tensor)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, fp32 in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != fp32.dtype:  # a cast of the model is for its arithmetic; the device is followed
                tensor.data = fp32.to(tensor.device)
        return self

    def extra_repr(self) -> str:
        return str(self.scheme)


class WeightQuantizer(Quantizer):
    """Fake-quantizes a weight `[O, ...]` (O = output axis): per tensor, per output channel, or per group of the rest.

    Not learned: range -> scale -> fake-quant of the current values in each forward; percentile and mse multiply the
    range by `clip [C]`. Learned: `scale` is a parameter, started at 2 * mean|w| / sqrt(qmax), as its authors have it;
    asymmetric, or where the scheme names percentile or mse, at that of the range found.

    fixed: whether scale and zero point stay what `fix` set, whatever the weight.
    active: False passes the weight as it is.
    """

    clip: Tensor | None

    def __init__(self, scheme: Scheme, weight: Tensor, delayed: bool = False) -> None:
        super().__init__(scheme, n_scales(scheme.granularity, weight.shape), weight.device, delayed)
        clipped = scheme.observer in ("percentile", "mse") and not scheme.learned
        self.register_buffer("clip", torch.ones_like(self.scale) if clipped else None)
        self.fixed, self.active = False, True

    def state_rules(self) -> Rules:
        return {**super().state_rules(), "clip": NOT_NEGATIVE}

    def initialize(self, weight: Tensor) -> None:
        """Starts the learnt steps, or the clip ratios, from the values of `weight`."""
        grouped = weight.detach().float().reshape(self.scale.numel(), -1)
        if self.scheme.learned:
            step, zero = self._qparams(*search_range(grouped, self.scheme))
            if self.scheme.symmetric and self.scheme.observer == "minmax":
                step = 2 * grouped.abs().mean(1) / math.sqrt(max(self.scheme.qmax, 1))
            with torch.no_grad():
                self.scale.copy_(step.clamp(min=SMALLEST_SCALE))
                self.zero.copy_(zero)
        elif self.clip is not None:
            self.clip.copy_(clip_ratio(grouped, self.scheme))

    @torch.no_grad()
    def fix(self, scale: Tensor, zero: Tensor) -> None:
        """Rounds to this grid from now on: scales > 0 and zero points, `[C]` fp32 each."""
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.fixed = True

    def forward(self, weight: Tensor) -> Tensor:
        return self._gated(self._fake_quant(weight)[0], weight) if self.active else weight

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale and zero `[C]` fp32 that `forward` uses for this weight."""
        with torch.no_grad():
            _, scale, zero = self._fake_quant(weight)
        return scale, zero

    def _fake_quant(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.scheme
        if s.learned:
            scale, zero = self._learnt(weight.numel() // self.scale.numel())
        elif self.fixed:
            scale, zero = self.scale, self.zero
        elif self.clip is not None:
            x_min, x_max = minmax(weight.detach(), granularity=s.granularity)
            scale, zero = self._qparams(x_min * self.clip, x_max * self.clip)
        else:
            return dynamic_fake_quant(
                weight, qmin=s.qmin, qmax=s.qmax, symmetric=s.symmetric, granularity=s.granularity
            )
        return fake_quant(weight, scale, zero, qmin=s.qmin, qmax=s.qmax, granularity=s.granularity), scale, zero


class ActivationQuantizer(Quantizer):
    """Fake-quantizes an activation with one scale, and tracks its range.

    State besides scale and zero: `range [2]` fp32 = (-min, max); `steps [1]` int64 = merges so far.
    `pending [2]` = (-min, max) of the batches since the last merge; it is no buffer, so DDP never overwrites it.
    `active` False passes the input through unchanged; calibration does so, and collects what it sees.
    """

    range: Tensor
    steps: Tensor

    def __init__(self, scheme: Scheme, device: torch.device, delayed: bool = False) -> None:
        super().__init__(scheme, 1, device, delayed)
        self.register_buffer("range", torch.zeros(2, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64, device=device))
        self.pending = torch.full((2,), -math.inf, dtype=torch.float32, device=device)
        self.active, self.collects = True, False
        self.samples: list[Tensor] | None = None
        self.empty_shape: tuple[int, ...] | None = None  # of the last batch without elements that calibration saw

    def state_rules(self) -> Rules:
        return {**super().state_rules(), "range": FINITE, "steps": NOT_NEGATIVE}

    @property
    def updates_range(self) -> bool:
        """Says whether the range moves with the data in training; other ranges come from calibration alone."""
        return self.scheme.observer in ("ema", "minmax") and not self.scheme.learned

    @property
    def wants_samples(self) -> bool:
        """Says whether calibration must keep values, not only extremes."""
        return self.scheme.learned or self.scheme.observer in ("percentile", "mse")

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"ActivationQuantizer: the input must be floating point, got {x.dtype}")
        if not self.active:
            if self.collects:
                self._collect(x)
            return x
        if x.numel() == 0:  # nothing to round or to observe; learnt steps stay in the graph, for DDP waits for them
            return sum((0.0 * p.sum().to(x.dtype) for p in self.parameters()), x)
        s = self.scheme
        if self.training and self.updates_range:
            y, x_min, x_max = observe_fake_quant(x, self.scale, self.zero, qmin=s.qmin, qmax=s.qmax)
            self._observe(x_min, x_max)
        else:
            scale, zero = self._learnt(x.numel()) if s.learned else (self.scale, self.zero)
            y = fake_quant(x, scale, zero, qmin=s.qmin, qmax=s.qmax)
        return self._gated(y, x)

    def _observe(self, x_min: Tensor, x_max: Tensor) -> None:
        self.pending.copy_(torch.maximum(self.pending, torch.cat([-x_min, x_max])))

    def start_calibration(self) -> None:
        self.active, self.collects = False, True
        self.samples = [] if self.wants_samples else None
        self.empty_shape = None

    def stop_calibration(self) -> None:
        """Quantizes again, and forgets what was collected."""
        self.active, self.collects = True, False
        self.samples = None
        self.pending.fill_(-math.inf)

    @torch.no_grad()
    def set_initial_range(self, extremes: Tensor, provisional: bool) -> None:
        """Starts from a range, (-min, max) `[2]`; a provisional one is replaced by the first training batch."""
        self.range.copy_(extremes)
        self.set_range(-extremes[:1], extremes[1:])
        self.steps.fill_(0 if provisional else 1)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.pending.fill_(-math.inf)  # was seen before

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        if x.numel() == 0:
            self.empty_shape = tuple(x.shape)
            return
        self._observe(*minmax(x.detach(), granularity=PerTensor()))
        if self.samples is not None:
            flat = x.detach().flatten().float()
            self.samples.append(flat[:: max(1, flat.numel() // 16384)].clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        super()._apply(fn, recurse)
        moved = fn(self.pending)
        self.pending = moved if moved.dtype == self.pending.dtype else self.pending.to(moved.device)
        return self


@contextmanager
def passing(quantizers: Iterable[ActivationQuantizer | WeightQuantizer]) -> Iterator[None]:
    """Lets quantizers pass what they get as it is, for the duration of the block."""
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.active = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.active = True


@torch.no_grad()
def update_ranges(quantizers: Sequence[ActivationQuantizer], group: dist.ProcessGroup | None = None) -> None:
    """Moves what the quantizers have seen since the last call into their ranges: one collective, no host sync.

    Every rank must call it the same number of times. The first batch replaces the start range; then `minmax` keeps the
    extremes, and `ema` moves by its argument towards the new ones. What is NaN or beyond WIDEST, as a batch whose step
    a gradient scaler skips may be, moves nothing.
    """
    quantizers = [q for q in quantizers if q.updates_range]
    if not quantizers:
        return
    pending = torch.stack([q.pending for q in quantizers])  # [Q, 2]
    widest_of_ranks(pending, group)
    by_scheme: dict[Scheme, list[int]] = {}
    for i, q in enumerate(quantizers):
        by_scheme.setdefault(q.scheme, []).append(i)
    for members in by_scheme.values():
        _merge([quantizers[i] for i in members], pending[members])


def _merge(quantizers: list[ActivationQuantizer], pending: Tensor) -> None:
    """Does what `update_ranges` does, for quantizers of one scheme; pending `[Q, 2]` is the same on every rank."""
    scheme = quantizers[0].scheme
    old = torch.stack([q.range for q in quantizers])  # [Q, 2]
    first = torch.stack([q.steps for q in quantizers]) == 0  # [Q, 1]
    seen = torch.linalg.vector_norm(pending, math.inf, 1, keepdim=True) < WIDEST  # [Q, 1]
    if scheme.observer == "minmax":
        moved = torch.maximum(old, pending)
    else:
        moved = old + (pending - old) * float(scheme.argument or 0.0)
    new = torch.where(seen, torch.where(first, pending, moved), old)
    scale, zero = quantizers[0]._qparams(-new[:, 0], new[:, 1])
    foreach_copy_([q.range for q in quantizers], list(new.unbind(0)))
    foreach_copy_([q.scale for q in quantizers], list(scale[:, None].unbind(0)))
    foreach_copy_([q.zero for q in quantizers], list(zero[:, None].unbind(0)))
    foreach_add_([q.steps for q in quantizers], list(seen.long().unbind(0)))
    foreach_copy_([q.pending for q in quantizers], [pending.new_full((2,), -math.inf)] * len(quantizers))


@torch.no_grad()
def calibrated_range(
    quantizer: ActivationQuantizer, name: str, group: dist.ProcessGroup | None = None
) -> Tensor | None:
    """Returns (-min, max) `[2]` of what calibration collected, by the scheme's observer; None if it saw nothing.

    Under torch.distributed the extremes, and percentile and mse ranges, are the widest of all ranks.

    Raises:
        ValueError: if the values seen were not finite.
    """
    pending = quantizer.pending.clone()
    if quantizer.samples and bool(pending.isfinite().all()):
        x_min, x_max = search_range(torch.cat(quantizer.samples)[None], quantizer.scheme)
        pending = torch.cat([-x_min, x_max])
    widest_of_ranks(pending, group)
    if bool((pending == -math.inf).all()):
        return None
    if not bool(pending.isfinite().all()):
        low, high = -pending[0].item(), pending[1].item()
        raise ValueError(f"calibrate: what {name} sees must be finite, got a range of [{low}, {high}]")
    return pending


def widest_of_ranks(extremes: Tensor, group: dist.ProcessGroup | None) -> None:
    """Takes the maximum over all ranks, in place. (-min, max) makes one collective do for both ends."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
