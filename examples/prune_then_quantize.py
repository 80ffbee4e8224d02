"""Runs a pipeline: SCOP removes channels, then SimQAT quantizes the rest; it goes on where it was interrupted.

pip install 'golden-stick-triton[cli]'
python prune_then_quantize.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import gs_algos
from gs_algos import SCOP, Pipeline, SimQAT, Stage


def build() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main(float_epochs: int = 15, epochs: int = 6, folder: str = "digits-pruned-int8") -> tuple[float, float]:
    digits = load_digits()
    x, target = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    batches = len(torch.arange(1400).split(64))

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return (net.eval()(x[1400:]).argmax(1) == target[1400:]).float().mean().item()

    def fit(net: nn.Module, epochs: int, stage: Stage | None = None) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(1400).split(64):
                nn.functional.cross_entropy(net.train()(x[batch]), target[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if stage is not None:
                    stage.algorithm.step()

    torch.manual_seed(0)
    net = build()
    fit(net, float_epochs)
    before = accuracy(net)
    # in the first third of its training SCOP weighs channels against knock-offs, then it decides
    scop = SCOP(rate=0.5, round_to=8, select_steps=max(1, epochs // 3) * batches)
    pipeline = Pipeline([scop, SimQAT()], folder)
    inputs = x[:8]
    print(pipeline.plan(net, inputs))  # what each stage would do to the network as it is; touches nothing
    if Path(folder, "pipeline.json").is_file():
        net = pipeline.resume(build, inputs, lambda net, stage: fit(net, epochs, stage))
    else:
        net = pipeline.run(net, inputs, lambda net, stage: fit(net, epochs, stage))
    print(scop.summary(net))
    loaded = gs_algos.load(Path(folder, "2-simqat"), build)  # the original builder: the history reshapes what it makes
    after = accuracy(loaded)
    print(f"float: {before:.1%}; pruned and quantized: {after:.1%}")
    return before, after


if __name__ == "__main__":
    main()
