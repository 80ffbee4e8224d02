"""What the tuner needs of `qmatmul`: tiles to try, operands, a launch with a given tile, and the cost of one."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gs_kernels.aot.compile import record_launches
from gs_kernels.aot.report import Report, report
from gs_kernels.aot.trace import Call
from gs_kernels.aot.work import Work
from gs_kernels.qmatmul.tiles import FEW_ROWS, Plan, choose_plan, rule_of
from gs_kernels.tuning.cards import Card
from gs_kernels.tuning.cost import estimate, predict_call
from gs_kernels.tuning.tables import SPACES

GROUP = 128  # elements per scale of the weights that are tuned for
DTYPE = torch.bfloat16
CHOICES = SPACES["qmatmul"].choices
DENSE = {name: True if name == "dense" else values[0] for name, values in CHOICES.items()}


@dataclass(frozen=True)
class Product:
    """x `[m, k]` times a weight `[n, k]` of so many bits."""

    m: int
    n: int
    k: int
    bits: int

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1 or self.bits not in (1, 2, 4, 8) or self.k % GROUP:
            raise ValueError(
                f"gs_kernels.tuning: m and n must be >= 1, k a multiple of {GROUP}, bits 1, 2, 4 or 8, got {self}"
            )

    def operands(self, device: str) -> tuple[Tensor, tuple[Any, ...]]:
        """x, and what the launcher takes of the weight; on "meta" without memory. Any bits are codes."""
        blocks = (self.k // 128, self.n, 8 * self.bits)
        zero = 0.5 if self.bits == 1 else 2.0 ** (self.bits - 1)
        if device == "meta":
            x = torch.empty(self.m, self.k, dtype=DTYPE, device=device)
            codes = torch.empty(blocks, dtype=torch.int16, device=device)
            scale = torch.empty(self.n, self.k // GROUP, dtype=DTYPE, device=device)
        else:
            draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
            x = torch.randn(self.m, self.k, **draw).to(DTYPE)
            codes = torch.randint(-(1 << 15), 1 << 15, blocks, dtype=torch.int16, **draw)
            step = 2 / (2**self.bits * self.k**0.5)
            scale = torch.rand(self.n, self.k // GROUP, **draw).add_(1).mul_(step).to(DTYPE)
        return x, (codes, scale, None, zero, None)

    def plan(self, tile: dict[str, Any], sm: int, sm_count: int) -> Plan:
        """What `choose_plan` would make of a table that had this tile for this problem."""
        rules = (rule_of(self.m, tile),)
        sizes = (self.m, self.n, self.k, self.bits)
        return choose_plan(*sizes, x_bits=16, levels=False, sm=sm, sm_count=sm_count, rules=rules)

    def work(self, tile: dict[str, Any], split: int) -> Work:
        """What `work_of` reads from the launch of a tile with K in so many parts."""
        y, turns = self.m * self.n, self.k // 128
        tiles_of_y = -(-self.m // tile["block_m"]) * -(-self.n // tile["block_n"])
        weight = self.n * self.k * self.bits // 8 + 2 * self.n * self.k // GROUP
        flops = 2 * 128 * tile["block_m"] * tile["block_n"] * tiles_of_y * turns
        stored = 2 * y if split == 1 else 4 * split * y
        loaded = weight + 2 * self.m * self.k
        return Work(tiles_of_y * split, loaded, stored, {"16bit": flops}, -(-turns // split))

    def run(self, x: Tensor, parts: tuple[Any, ...], plan: Plan, asm: bool) -> Tensor:
        kernel = importlib.import_module("gs_kernels.qmatmul.kernel")
        if plan.dense:
            w = kernel.dequantize(parts, self.bits, self.n, self.k, GROUP, x.dtype)
            return torch.nn.functional.linear(x, w)
        y: Tensor = kernel.multiply(x, parts, None, self.bits, self.n, self.k, GROUP, "none", plan, asm)
        return y


def tiles(m: int) -> Iterator[dict[str, Any]]:
    """All that are worth a look for so many rows, without split-K: blocks of x hold at least half of them, or 64."""
    rows = max(16, 1 << (m - 1).bit_length())
    names = [name for name in CHOICES if name not in ("dense", "programs")]
    for values in itertools.product(*(CHOICES[name] for name in names)):
        tile = {"dense": False, **dict(zip(names, values, strict=True)), "programs": 0}
        size = tile["block_m"] * tile["block_n"]
        fits = min(rows // 2, 64) <= tile["block_m"] <= rows and size <= 256 * 128
        held = tile["warps"] >= 4 or size <= 64 * 16
        scaled = not tile["scale_parts"] or tile["block_m"] <= 2 * FEW_ROWS
        if fits and held and scaled and 2 <= tile["stages"] <= 5:
            yield tile


class Static:
    """Compiles tiles for one target, each once whatever the sizes, and predicts problems on a card."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.sm = int(card.target.removeprefix("sm_"))
        self.kernels: dict[tuple[Any, ...], Report | str] = {}
        self.compiled = 0

    def kernel(self, problem: Product, tile: dict[str, Any]) -> Report | str:
        """What the tile's machine code costs, or why it is of no use: it spills, or no block of it fits."""
        key = problem.bits, *tile.values()
        if key not in self.kernels:
            self.kernels[key] = self._compile(problem, tile)
        return self.kernels[key]

    def _compile(self, problem: Product, tile: dict[str, Any]) -> Report | str:
        self.compiled += 1
        x, parts = replace(problem, m=max(2, problem.m)).operands("meta")  # one row would be a kernel of its own
        plan = problem.plan(tile, self.sm, self.card.sm_count)
        try:
            with record_launches(self.card.target) as launches:
                problem.run(x, parts, plan, asm=True)
        except RuntimeError as error:  # the compiler's own
            return f"does not compile: {type(error).__name__}"
        kernel = report(launches[0].compiled, self.card.target, elements=128 * tile["block_n"])
        if kernel.spills:
            return "spills"
        return kernel if kernel.occupancy.blocks else f"does not fit: {kernel.occupancy.limiter}"

    def predict(self, problem: Product, tile: dict[str, Any]) -> tuple[float, float]:
        """Microseconds of a tile that `kernel` has a report of, in all and of its instructions alone.

        Split-K and the sum of its parts are included.
        """
        kernel = self.kernel(problem, {**tile, "programs": 0})
        if isinstance(kernel, str):
            raise ValueError(f"gs_kernels.tuning: a tile must run to be predicted, got one that {kernel}")
        split = problem.plan(tile, self.sm, self.card.sm_count).parts(problem.k // 128)
        whole = estimate(kernel, problem.work(tile, split), self.card)
        y = problem.m * problem.n
        parts = predict_call(Call("sum of the parts", 4 * split * y + 2 * y), self.card).us if split > 1 else 0.0
        return whole.us + parts, whole.instructions_us

    def predict_dense(self, problem: Product) -> float:
        """Dequantise, then multiply as a float layer does."""
        x, w, y = problem.m * problem.k, problem.n * problem.k, problem.m * problem.n
        packed = w * problem.bits // 8 + 2 * w // GROUP
        calls = Call("dequantize", packed + 2 * w), Call("linear", 2 * (x + w + y), 2 * problem.m * w, "16bit")
        return sum(predict_call(call, self.card).us for call in calls)


def runner(problem: Product, device: str, sm: int, sm_count: int) -> Callable[[dict[str, Any]], Callable[[], Tensor]]:
    """Makes a call of a tile on a real GPU."""
    x, parts = problem.operands(device)
    asm = torch.version.hip is None

    def of(tile: dict[str, Any]) -> Callable[[], Tensor]:
        plan = problem.plan(tile, sm, sm_count)
        return lambda: problem.run(x, parts, plan, asm)

    return of
