"""Tiny networks, each one trap or one way of being hard to trace, and what the tests of fx share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.fx.capture.capture import capture
from gs_algos.fx.patterns import Match, Refusal, match


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """The model in eval mode with batch norms that do something: statistics and affine parameters away from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 2.0),
                (module.weight, -1.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def found(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[Match], list[Refusal]]:
    return match(capture(model, args, kwargs), model)


def reasons(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """site -> reason of every refusal."""
    return {refusal.site: refusal.reason for refusal in found(model, *args, **kwargs)[1]}


def roles(model: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, str]]:
    """Roles of every conv and linear match."""
    return [m.roles for m in found(model, *args, **kwargs)[0] if m.pattern in ("conv_bn_act", "linear_act")]


class Chain(nn.Module):
    """Its children one after the other, by name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class ConvCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(self.conv(x)))


class OneConvTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn1(y) + self.bn2(y)


class OneNormTwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x))


class NormBeforeConv(nn.Module):
    """DenseNet's order."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class StandardisedConv(nn.Conv2d):
    """nf_resnet: weights standardised by F.batch_norm in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class TiedConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) * self.b(x)


class ParallelBranches(nn.Module):
    """RepVGG in training form: conv 3x3 + BN, conv 1x1 + BN, and a BN on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.identity(x))


class ConvIsAlsoOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"features": y, "out": self.bn(y)}


class WeightReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.norm()


class DropPath(nn.Module):
    """Stochastic depth: in eval mode it returns its input, and no tracer sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) if self.training else x


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: a batch norm with its own forward and an activation inside."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


def fork(x: Tensor) -> Tensor:
    """Goes on by the data, which no tracer follows."""
    return x if x.sum().item() < 1e9 else -x


class Opaque(nn.Module):
    """Neither torch.export nor torch.fx can follow; its children can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(fork(self.body(x).mean((2, 3))))


class FlatOpaque(nn.Module):
    """As Opaque, with nothing but leaves inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(fork(self.bn(self.conv(x)).mean((2, 3))))


class UnknownToExport(nn.Module):
    """Calls a C function on the size of a tensor's storage, which fake tensors lack; torch.fx records such a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc, self.bn1 = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 5),
            nn.BatchNorm1d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.bn1(self.fc(real_only(y)))


def _real_only(x: Tensor) -> Tensor:
    return x + 0.0 * torch.from_numpy(x.detach().numpy())


real_only = _real_only
torch.fx.wrap("real_only")


class Functional(nn.Module):
    """A convolutional network that makes no use of layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.w1 = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator) / 5)
        self.b1 = nn.Parameter(torch.randn(4, generator=generator))
        self.heads = nn.ParameterList([torch.randn(5, 4, generator=generator)])
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.relu(F.conv2d(x, self.w1, self.b1, stride=2, padding=1))
        y = F.dropout(y, 0.4, self.training)
        if mask is not None:
            y = y * mask
        return F.linear(y.mean((2, 3)), self.heads[0])


class FunctionalMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w1 = nn.Parameter(torch.randn(8, 6, generator=generator) / 3)
        self.b1 = nn.Parameter(torch.zeros(8))
        self.w2 = nn.Parameter(torch.randn(3, 8, generator=generator) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w2)
