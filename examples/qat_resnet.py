"""Trains a small ResNet on handwritten digits, quantization-aware, from float to 8-bit integers.

pip install 'golden-stick-triton[cli]'
python qat_resnet.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gs_algos
from gs_algos import SimQAT


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(x + self.bn2(self.conv2(y)))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def main(float_epochs: int = 15, epochs: int = 5, folder: str = "digits-int8") -> tuple[float, float]:
    digits = load_digits()
    x, target = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return (net.eval()(x[test]).argmax(1) == target[test]).float().mean().item()

    def fit(net: nn.Module, epochs: int, lr: float, algo: SimQAT | None = None) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in torch.randperm(1400).split(64):
                nn.functional.cross_entropy(net.train()(x[train][batch]), target[train][batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if algo is not None:
                    algo.step()  # ranges of activations, delays

    torch.manual_seed(0)
    net = resnet()
    fit(net, float_epochs, lr=3e-3)
    print(f"float: {accuracy(net):.1%}")

    algo = SimQAT(weight="int8@channel", act="int8@tensor:ema")
    print(algo.plan(net, x[:8]))  # what will be quantized, and why the rest will not; touches nothing
    net = algo.apply(net, x[:8])  # the same parameters, now trained against their rounding
    fit(net, epochs, lr=3e-4, algo=algo)
    trained = accuracy(net)
    net = algo.convert(net)  # codes and scales; raises if a layer gives another output than the trained one
    print(algo.summary(net))
    gs_algos.save(net, folder)
    loaded = accuracy(gs_algos.load(folder, resnet))
    print(f"trained for 8 bits: {trained:.1%}; converted, saved and loaded: {loaded:.1%}")
    return trained, loaded


if __name__ == "__main__":
    main()
