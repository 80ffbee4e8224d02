"""Swaps the class of live batch norms behind quantized layers; their parameters and statistics stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gs_algos.core.modules import swapped_class
from gs_kernels.runtime.torch_private import _BatchNorm

_normalized = WeakTensorKeyDictionary()  # input -> the batch norm, the input's version (None: not counted), the output


class WithChildren(_BatchNorm):
    """Types a batch norm that may have children which run behind it (timm's BatchNormAct2d: an activation)."""

    _norm_children: tuple[nn.Module, ...]  # in a tuple: they are registered already

    def _behind(self, y: Tensor) -> Tensor:
        for child in self._norm_children:
            y = child(y)
        return y


class CoupledBatchNorm(WithChildren):
    """Shares a batch norm's work with the layer in front; the base of such batch norms."""

    @property
    def qconfig(self) -> None:
        """Raises: `SyncBatchNorm.convert_sync_batchnorm`, which alone looks here, would have the work done twice."""
        raise RuntimeError(
            f"{type(self).__name__}: a batch norm that works together with the layer in front (fold_bn='two_conv', "
            "freeze_bn, state batch norm) must stay as it is, got SyncBatchNorm.convert_sync_batchnorm; "
            "convert before `apply`, whose plan says what is left as it is then"
        )


class BypassedBatchNorm(CoupledBatchNorm):
    """Passes its input through: in a two-conv fold the conv normalizes, with this norm's parameters and statistics."""

    prefix = "BypassedBatchNorm"

    def forward(self, x: Tensor) -> Tensor:
        return self._behind(x)


class Freezable(CoupledBatchNorm):
    """Normalizes by its running statistics once `frozen` (bool [1]) is set, without recompiling."""

    prefix = "Freezable"
    frozen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if x.numel() == 0:
            return super().forward(x)  # which leaves the running statistics alone
        wide = x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        used_mean = torch.where(self.frozen, running_mean(self), mean)
        used_sigma = torch.where(self.frozen, running_sigma(self), (var + self.eps).sqrt())
        update_running(self, mean.detach(), var.detach(), x.numel() // x.shape[1], self.frozen)
        gamma, beta = affine(self)
        slope = gamma / used_sigma
        y = wide * per_channel(slope, wide) + per_channel(beta - used_mean * slope, wide)
        return self._behind(y.to(x.dtype))


class PrecomputedBatchNorm(WithChildren):
    """Returns the output that the layer in front has computed and attached to its own (`attach_normalized`), if any.

    An input that was changed in place since, by a hook for one, is normalized as usual. A norm that replaces this one,
    as `SyncBatchNorm.convert_sync_batchnorm` does, still gets the input it expects.
    """

    prefix = "PrecomputedBatchNorm"

    def forward(self, x: Tensor) -> Tensor:
        attached = None if torch.compiler.is_compiling() else _normalized.pop(x, None)
        if attached is None or attached[:2] != (self, _version(x)):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return self._behind(attached[2])
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return self._behind(with_values(nn.functional.batch_norm(x, *own, False, 0.0, self.eps), attached[2]))


def attach_normalized(y: Tensor, bn: PrecomputedBatchNorm, normalized: Tensor) -> Tensor:
    """Attaches to y, the input of a batch norm, the output that the norm shall return for it."""
    _normalized[y] = (bn, _version(y), normalized)
    return y


def move_normalized(y: Tensor, new: Tensor) -> Tensor:
    """Moves the output attached to y, if any, to `new`."""
    attached = _normalized.pop(y, None)
    return new if attached is None else attach_normalized(new, attached[0], attached[2])


def with_values(y: Tensor, values: Tensor) -> Tensor:
    """Returns the values with the gradients of y."""
    return values + (y - y.detach())


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def swap_norm(bn: _BatchNorm, mixin: type[WithChildren], norm_children: tuple[nn.Module, ...]) -> None:
    """Turns a live batch norm into one of the above; norm_children: its children that run behind it."""
    bn.__class__ = swapped_class(mixin, type(bn))
    bn._norm_children = norm_children  # type: ignore[assignment]


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """Shapes `[O]` as a factor of `y [B, O, ...]`, in y's dtype."""
    return values.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


def running_sigma(bn: _BatchNorm) -> Tensor:
    assert bn.running_var is not None
    return (bn.running_var.float() + bn.eps).sqrt()


def running_mean(bn: _BatchNorm) -> Tensor:
    assert bn.running_mean is not None
    return bn.running_mean.float()


def affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Returns (gamma, beta) `[O]` fp32; ones and zeros if the batch norm has none."""
    ones = torch.ones_like(running_mean(bn))
    return (ones if bn.weight is None else bn.weight.float(), 0 * ones if bn.bias is None else bn.bias.float())


@torch.no_grad()
def update_running(bn: _BatchNorm, mean: Tensor, var: Tensor, n: int, frozen: Tensor) -> None:
    """Updates the running statistics as a batch norm does: mean and (biased) var `[O]`, of n values each."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    moving = (~frozen).float()
    bn.num_batches_tracked.add_((~frozen).long().view(()))
    average: Tensor = 1.0 / bn.num_batches_tracked.float().clamp(min=1)
    momentum = average if bn.momentum is None else bn.momentum
    bn.running_mean.add_((mean - bn.running_mean.float()) * momentum * moving)
    bn.running_var.add_((var * (n / max(n - 1, 1)) - bn.running_var.float()) * momentum * moving)
