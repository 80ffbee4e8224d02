"""Defines an algorithm of your own: of every four weights of a linear layer only the largest two stay.

`register_algorithm` makes it known in this process. A package names it in its pyproject.toml instead:

    [project.entry-points."gs_algos.algorithms"]
    n-of-four = "your_package.module:NOfFour"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import gs_algos
from gs_algos import Algorithm, AlgorithmConfig, Plan, PlanRow


@dataclass(frozen=True)
class NOfFourConfig(AlgorithmConfig):
    keep: int = 2
    who: ClassVar[str] = "NOfFour"


@gs_algos.register_algorithm
class NOfFour(Algorithm):
    name: ClassVar[str] = "n-of-four"
    config: NOfFourConfig

    def __init__(self, config: NOfFourConfig | None = None, **options: Any) -> None:
        self.config, self.steps = NOfFourConfig.choose(config, options), 0

    def plan(self, model: nn.Module, example_inputs: Any) -> Plan:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        odd = {name: "its inputs are no multiple of 4" for name, m in layers.items() if m.in_features % 4}
        rows = (PlanRow(n, "Linear", "keep" if n in odd else "thin", reason=odd.get(n, "")) for n in layers)
        return Plan(self.name, "", tuple(rows))

    def apply(self, model: nn.Module, example_inputs: Any) -> nn.Module:
        self.model, self.rows = model, self.plan(model, example_inputs).acted()
        self.entry = self.remember(model, "prepared", self.rows)  # what `save` writes, and `load` reads
        return model

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.entry["steps"] = self.steps
        for row in self.rows:
            fours = self.model.get_parameter(f"{row.site}.weight").view(-1, 4)
            fours.scatter_(1, fours.abs().topk(4 - self.config.keep, largest=False).indices, 0.0)

    def convert(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        self.remember(model, "converted", self.rows, self.steps)
        return model  # one that makes new layers puts them in here, and again in `restore`

    def summary(self, model: nn.Module) -> str:
        zeros = {row.site: (model.get_parameter(f"{row.site}.weight") == 0).float().mean() for row in self.rows}
        return "\n".join(f"{site}: {share:.0%} zeros" for site, share in zeros.items())

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        return model

    @classmethod
    def resume(cls, model: nn.Module) -> NOfFour:
        entry = gs_algos.history(model)[-1]
        algo = cls(NOfFourConfig.from_dict(entry["config"]))
        algo.apply(model, None)
        algo.steps = entry["steps"]
        return algo


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def main(steps: int = 20, folder: str = "two-of-four") -> nn.Module:
    torch.manual_seed(0)
    net, x = build(), torch.randn(8, 16)
    algo = NOfFour(keep=2)
    print(algo.plan(net, x))
    net = algo.apply(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    net = algo.convert(net)
    print(algo.summary(net))
    gs_algos.save(net, folder)
    return gs_algos.load(folder, build)


if __name__ == "__main__":
    main()
