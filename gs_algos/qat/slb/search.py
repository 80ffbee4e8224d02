"""Searches for the codes of one weight: logits over the levels, their mixture, and the codes once they are chosen.

State of a weight `[O, ...]` with R = elements per output, L levels and P = planes of logits (L, or 1 for two levels):
`logits [O, P, R]` · `scale [C]` fp32, or none · `temperature [1]` fp32 > 0, or 0 once the codes are chosen · `codes`
uint8 `[O, ceil(R * bits / 8)]`, packed, zeros until then · `horizon [1]` int64, the steps of the schedule · `trace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gs_algos.core.tensor_rules import FINITE, NOT_NEGATIVE, POSITIVE, Rules, equal_to
from gs_algos.quant.fast_path import OffFastPath
from gs_algos.quant.level_grid import LevelGrid
from gs_kernels import PackedWeight, dequantize_packed, slb_pack, slb_weight, unpack_codes

FP32 = ("scale", "levels", "temperature", "trace")
NOT_YET = -1.0  # in a row of the trace that is still to come
BINS = 10  # of the histogram of the largest probability, over [0, 1]
SAMPLES = 2**16  # weights of a layer that the histogram looks at


class LevelSearch(nn.Module, OffFastPath):
    """Chooses one of the grid's levels for each element of a weight, by gradient descent on logits.

    Called with the dtype and memory format that the layer wants, it gives the weight: the mixture
    `sum_i softmax(logits / temperature)_i * level_i * scale`, or with `quantized` the level of the largest logit.
    Once `harden` has been called it gives the chosen codes' values, whatever happens to the logits.

    Args:
        shape: of the weight, output channels first.
        total_steps: optimizer steps of the whole schedule; a state_dict of another schedule is refused.
        points: rows of the trace, 0 for none.
        fused: the logits are trained by a fused optimizer, so autograd leaves them alone.
    """

    scale: Tensor | None
    levels: Tensor
    temperature: Tensor
    codes: Tensor
    horizon: Tensor
    trace: Tensor | None
    loaded: float | None = None  # the temperature of a state_dict that no step has followed yet
    owned: bool = False  # whether a fused optimizer trains the logits

    def __init__(
        self,
        grid: LevelGrid,
        shape: Sequence[int],
        total_steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        points: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.shape, self.one_hot = grid, tuple(shape), False
        o, r = shape[0], math.prod(shape[1:])
        self.logits = nn.Parameter(torch.zeros(o, grid.planes, r, dtype=dtype, device=device), requires_grad=not fused)
        n = grid.n_scales(o)
        scale = torch.ones(n, dtype=torch.float32, device=device) if n else None
        if grid.learned:
            self.scale = nn.Parameter(scale)  # type: ignore[arg-type]
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("levels", grid.levels(device))
        self.register_buffer("temperature", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("codes", torch.zeros(o, -(-r * grid.bits // 8), dtype=torch.uint8, device=device))
        self.register_buffer("horizon", torch.full((1,), total_steps, dtype=torch.int64, device=device))
        trace = torch.full((points, 2 + BINS), NOT_YET, dtype=torch.float32, device=device) if points else None
        self.register_buffer("trace", trace)

    def state_rules(self) -> Rules:
        rules = {"logits": FINITE, "levels": equal_to(self.levels), "trace": FINITE, "horizon": NOT_NEGATIVE}
        return {**rules, "temperature": NOT_NEGATIVE, "scale": FINITE if self.grid.learned else POSITIVE}

    @property
    def size(self) -> tuple[int, int]:
        """Returns (O, R)."""
        return self.shape[0], math.prod(self.shape[1:])

    def scales(self) -> Tensor | None:
        """Returns the scale of each output, `[O]` fp32."""
        return None if self.scale is None else self.scale.expand(self.shape[0]).contiguous()

    def forward(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        quantized: bool = False,
    ) -> Tensor:
        if self.one_hot:
            return self._chosen(dtype).contiguous(memory_format=memory_format)
        return slb_weight(
            self.logits,
            self.levels,
            self.temperature,
            self.scales(),
            hard=quantized,
            shape=self.shape,
            dtype=dtype,
            memory_format=memory_format,
        )

    def local_mixture(self) -> Tensor:
        """Returns this rank's rows of the mixture, fp32; all of it if the logits are not sharded."""
        scale = self.scales()
        scale = None if scale is None else rows_of(scale, self.logits).contiguous()
        logits = local(self.logits)
        shape = (logits.shape[0], *self.shape[1:])
        return slb_weight(logits, self.levels, self.temperature, scale, shape=shape, dtype=torch.float32)

    def _chosen(self, dtype: torch.dtype) -> Tensor:
        """Returns the values of the chosen codes. A learned scale keeps its gradient."""
        if not self.grid.learned:
            return dequantize_packed(self.packed(), dtype).view(self.shape)
        values = dequantize_packed(self.packed(scaled=False), torch.float32)
        return (values * self.scales()[:, None]).to(dtype).view(self.shape)  # type: ignore[index]

    def packed(self, scaled: bool = True) -> PackedWeight:
        """Packs the chosen codes and scales, `(code - zero) * scale`; before `harden`, those of the largest logits."""
        codes = self.codes if self.one_hot else slb_pack(whole(self.logits), bits=self.grid.bits)
        scale = codes.new_full((self.shape[0], 1), self.grid.step, dtype=torch.float32)
        if scaled and self.scale is not None:
            scale = scale * whole(self.scale.detach()).view(-1, 1)
        return PackedWeight(codes, scale, self.grid.zero, None, self.grid.bits, self.size, self.size[1])

    @torch.no_grad()
    def level_shares(self) -> dict[float, float]:
        """Returns the share of the weights that takes each level: the chosen one, or that of the largest logit."""
        held = self.packed(scaled=False)
        codes = unpack_codes(held.codes, held.bits, held.shape)
        counts = torch.bincount(codes.flatten().int(), minlength=len(self.levels))
        return dict(zip(self.levels.tolist(), (counts / codes.numel()).tolist(), strict=True))

    @torch.no_grad()
    def harden(self) -> None:
        """Takes the code of the largest logit, the lowest of equals, for good. Under FSDP2 every rank must call it."""
        if not self.one_hot:
            self.codes.copy_(self.packed(scaled=False).codes)
            self.temperature.zero_()
            self.one_hot = True
            self.logits.grad = None

    @torch.no_grad()
    def discretization_gap(self) -> Tensor:
        """Returns `||W_c - W_q|| / ||W_q||`, `[1]` fp32: how far the mixture is from what `convert` would take."""
        if self.one_hot:
            return torch.zeros_like(self.temperature)
        soft, hard = (self._whole_weight(quantized) for quantized in (False, True))
        return ((soft - hard).norm() / hard.norm().clamp(min=torch.finfo(torch.float32).tiny)).view(1)

    def _whole_weight(self, quantized: bool) -> Tensor:
        scale = None if self.scale is None else whole(self.scale).expand(self.shape[0]).contiguous()
        return slb_weight(whole(self.logits), self.levels, self.temperature, scale, hard=quantized, dtype=torch.float32)

    @torch.no_grad()
    def confidence(self) -> Tensor:
        """Returns the largest probability of each of up to SAMPLES weights, spread over the layer, `[n]` fp32."""
        if self.one_hot:
            return torch.ones_like(self.temperature)
        a = whole(self.logits).transpose(1, 2).flatten(0, 1)  # [O * R, P]
        a = a[:: -(-a.shape[0] // SAMPLES)].float()
        if self.grid.planes == 1:
            return torch.sigmoid(a[:, 0].abs() / self.temperature)
        return torch.softmax(a / self.temperature, 1).amax(1)

    @torch.no_grad()
    def note(self, point: int) -> None:
        """Writes the gap, the mean confidence and its histogram (shares) into a row of the trace. No host sync."""
        if self.trace is None:
            return
        confidence = self.confidence()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        shares = torch.zeros_like(self.trace[0, 2:]).index_add_(0, bins, torch.ones_like(confidence))
        self.trace[point] = torch.cat([self.discretization_gap(), confidence.mean()[None], shares / confidence.numel()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in FP32}
        before: dict[str, Any] = {name: t if t is None else t.data for name, t in tensors.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype != torch.float32:
                new.data = old.to(new.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        theirs = state_dict.get(prefix + "horizon")
        if theirs is not None and int(theirs) != int(self.horizon):
            rest[-1].append(
                f"SLB: {prefix}horizon must be the {int(self.horizon)} steps of this schedule, got {int(theirs)}; "
                "resume with the total_steps that the run began with"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if prefix + "temperature" in state_dict:
            self.loaded = float(self.temperature)
            self.one_hot = self.loaded == 0

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.grid}{', one-hot' if self.one_hot else ''}"


def whole(t: Tensor) -> Tensor:
    """Returns the tensor, gathered from all ranks if it is sharded; a collective then."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def rows_of(t: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor that every rank has whole, cut as `like` is sharded. No communication."""
    if not hasattr(like, "device_mesh"):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    everywhere = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
