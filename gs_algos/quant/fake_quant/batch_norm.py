"""Live batch norms behind quantized layers: their class is swapped, their parameters and statistics stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gs_algos.core.modules import swapped_class
from gs_kernels.runtime.torch_private import _BatchNorm

_normed = WeakTensorKeyDictionary()  # of an input: the batch norm, the input's version (None: not counted), the output


class WithChildren(_BatchNorm):
    """A batch norm that may have children which run behind it (timm's BatchNormAct2d: an activation)."""

    _norm_children: tuple[nn.Module, ...]  # in a tuple: they are registered already

    def _behind(self, y: Tensor) -> Tensor:
        for child in self._norm_children:
            y = child(y)
        return y


class CoupledBatchNorm(WithChildren):
    """A batch norm that shares its work with the layer in front."""

    @property
    def qconfig(self) -> None:
        """Raises: `SyncBatchNorm.convert_sync_batchnorm`, which alone looks here, would have the work done twice."""
        raise RuntimeError(
            f"{type(self).__name__}: a batch norm that works together with the layer in front (fold_bn='two_conv', "
            "freeze_bn, state batch norm) must stay as it is, got SyncBatchNorm.convert_sync_batchnorm; "
            "convert before `apply`, whose plan says what is left as it is then"
        )


class BypassedBatchNorm(CoupledBatchNorm):
    """The batch norm of a two-conv fold: its work is done in the conv; it keeps its parameters and statistics."""

    prefix = "BypassedBatchNorm"

    def forward(self, x: Tensor) -> Tensor:
        return self._behind(x)


class Freezable(CoupledBatchNorm):
    """A batch norm that uses its running statistics once `frozen` (bool [1]) is set, without recompiling."""

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
    """A batch norm whose output the layer in front may have made too, in a way of its own: the input brings it along.

    What has changed the input in place since, a hook for one, undoes that. And one that takes its place, as
    `SyncBatchNorm.convert_sync_batchnorm` makes it, still has the input it expects.
    """

    prefix = "PrecomputedBatchNorm"

    def forward(self, x: Tensor) -> Tensor:
        found = None if torch.compiler.is_compiling() else _normed.pop(x, None)
        if found is None or found[:2] != (self, _version(x)):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return self._behind(found[2])
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return self._behind(with_values(nn.functional.batch_norm(x, *own, False, 0.0, self.eps), found[2]))


def attach_normalized(y: Tensor, bn: PrecomputedBatchNorm, normed: Tensor) -> Tensor:
    """y, the input of a batch norm, with what the batch norm shall give."""
    _normed[y] = (bn, _version(y), normed)
    return y


def move_normalized(y: Tensor, new: Tensor) -> Tensor:
    """new, with what y was to bring along."""
    found = _normed.pop(y, None)
    return new if found is None else attach_normalized(new, found[0], found[2])


def with_values(y: Tensor, values: Tensor) -> Tensor:
    """values, with the gradients of y."""
    return values + (y - y.detach())


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def swap_norm(bn: _BatchNorm, mixin: type[WithChildren], norm_children: tuple[nn.Module, ...]) -> None:
    """Turns a live batch norm into one of the above; norm_children: its children that run behind it."""
    bn.__class__ = swapped_class(mixin, type(bn))
    bn._norm_children = norm_children  # type: ignore[assignment]


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """`[O]` as a factor of `y [B, O, ...]`, in y's dtype."""
    return values.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


def running_sigma(bn: _BatchNorm) -> Tensor:
    assert bn.running_var is not None
    return (bn.running_var.float() + bn.eps).sqrt()


def running_mean(bn: _BatchNorm) -> Tensor:
    assert bn.running_mean is not None
    return bn.running_mean.float()


def affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(gamma, beta) `[O]` fp32; ones and zeros if the batch norm has none."""
    ones = torch.ones_like(running_mean(bn))
    return (ones if bn.weight is None else bn.weight.float(), 0 * ones if bn.bias is None else bn.bias.float())


@torch.no_grad()
def update_running(bn: _BatchNorm, mean: Tensor, var: Tensor, n: int, frozen: Tensor) -> None:
    """What a batch norm does to its running statistics after a batch: mean and (biased) var `[O]`, of n values each."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    moving = (~frozen).float()
    bn.num_batches_tracked.add_((~frozen).long().view(()))
    average: Tensor = 1.0 / bn.num_batches_tracked.float().clamp(min=1)
    momentum = average if bn.momentum is None else bn.momentum
    bn.running_mean.add_((mean - bn.running_mean.float()) * momentum * moving)
    bn.running_var.add_((var * (n / max(n - 1, 1)) - bn.running_var.float()) * momentum * moving)
