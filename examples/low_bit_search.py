"""Searches for 2-bit weights by SLB: each is a softmax over four levels that becomes one of them.

pip install 'golden-stick-triton[cli]'
python low_bit_search.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import gs_algos
from gs_algos import SLB, LevelGrid


def build() -> nn.Module:
    hidden = [nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def main(epochs: int = 30, folder: str = "digits-2bit") -> tuple[float, float]:
    digits = load_digits()
    x, target = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train_x, train_target, test_x, test_target = x[:1400], target[:1400], x[1400:], target[1400:]
    steps = epochs * len(torch.arange(1400).split(64))

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return (net.eval()(test_x).argmax(1) == test_target).float().mean().item()

    torch.manual_seed(0)
    net = build()
    # 2 bits for most, 4 for the last layer, which has no batch norm behind it
    grid = LevelGrid(2, "channel")
    algo = SLB(weight=grid, total_steps=steps, rules=[("6", {"weight": "int4@channel"})])
    print(algo.plan(net, train_x[:8]))
    net = algo.apply(net, train_x[:8])
    # the logits of the levels take the place of the weights: make the optimizer now, and give them a rate of their own
    groups = [{"params": algo.logits(), "lr": 1e-2}, {"params": algo.parameters(net), "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups)
    for epoch in range(epochs):
        for batch in torch.randperm(1400).split(64):
            nn.functional.cross_entropy(net.train()(train_x[batch]), train_target[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()  # the temperature: at 60 % of the steps each weight has chosen its level
        if epoch % 10 == 0:
            print(f"epoch {epoch}: mixtures are {max(algo.gaps().values()):.1%} from their levels, {accuracy(net):.1%}")
    trained = accuracy(net)
    net = algo.convert(net)
    print(algo.summary(net))
    gs_algos.save(net, folder)
    loaded = accuracy(gs_algos.load(folder, build))
    print(f"trained: {trained:.1%}; packed, saved and loaded: {loaded:.1%}")
    return trained, loaded


if __name__ == "__main__":
    main()
