"""Describes a kernel to the tuner: declared in `SPACES` of `tune.py` in the kernel's own folder, and nowhere else.

A folder of `gs_kernels.runtime.opspec.OPS` with such a file is found from there; pruning, ranking, timing, tables and
their checks come with the declaration. Kernels without a choice of tiles are listed in `FIXED`, each with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from gs_kernels.runtime.opspec import OPS

Problem: TypeAlias = dict[str, int]
Tile: TypeAlias = dict[str, Any]


class Machine(NamedTuple):
    """Describes a GPU. sm: 90 for compute capability 9.0. sm_count: number of processors."""

    sm: int
    sm_count: int


@dataclass(frozen=True)
class Space:
    """Declares one choice of tiles, which may serve several kernels.

    op: its name in tables. kernels: which it is for.
    sizes: of a problem, each >= 0. Entries of a table hold up to a number of `rows`, between two by ratio; sizes that
        are `near` may differ from an entry's; the others must be equal.
    choices: what each part of a tile may be.
    refuses(problem): why no kernel takes it, "" if one does.
    candidates(problem): tiles that are worth a look.
    default(problem, machine): the tile that runs without a table.
    reference(problem, machine): the tile whose results the others have to give.
    make(problem, device): operands; on "meta" without memory.
    run(problem, operands, machine): what launchers compute with the tile that is `forced`.
    describe(tile): for people.
    """

    op: str
    kernels: tuple[str, ...]
    sizes: tuple[str, ...]
    rows: str
    near: tuple[str, ...]
    choices: Mapping[str, tuple[Any, ...]]
    refuses: Callable[[Problem], str]
    candidates: Callable[[Problem], Iterator[Tile]]
    default: Callable[[Problem, Machine], Tile]
    reference: Callable[[Problem, Machine], Tile]
    make: Callable[[Problem, str], Any]
    run: Callable[[Problem, Any, Machine], Any]
    describe: Callable[[Tile], str]

    @property
    def exact(self) -> tuple[str, ...]:
        return tuple(name for name in self.sizes if name != self.rows and name not in self.near)

    def check(self, problem: Problem) -> None:
        """Checks the sizes of a problem.

        Raises:
            ValueError: if the sizes are not those of the space, or no kernel takes them.
        """
        if tuple(problem) != self.sizes or not all(type(v) is int and v >= 0 for v in problem.values()):
            raise ValueError(f"gs_kernels.tuning: {self.op} needs {', '.join(self.sizes)}, all >= 0, got {problem}")
        if why := self.refuses(problem):
            raise ValueError(f"gs_kernels.tuning: {self.op}: {why}, got {problem}")


# what a program of these holds follows from the sizes alone, or is too little to choose
FIXED: dict[str, str] = {
    "_dynamic_fake_quant_kernel": "a program holds whole rows: the range of a row comes before its codes",
    "_quantize_rows_kernel": "a program holds whole rows: the range of a row comes before its codes",
    "_choose_qparams_kernel": "one number per channel",
    "_search_clip_ratio_kernel": "a program holds whole rows: all ratios are tried on one read of them",
    "_score_candidates_kernel": "rounding x comes before each product, and is half of the work whatever the tile",
    "_gptq_block_kernel": "a warp holds all columns of a block: each waits for those before",
    "_gram_kernel": "thousands of tokens deep: a tile is as many columns as registers hold, if all processors get one",
    "_hadamard_kernel": "a program holds whole blocks, and of rows with scales whole rows: all factors of a matrix",
    "_kl_divergence_fwd_kernel": "a program holds part of a row, 16 logits of both networks a thread",
    "_kl_divergence_bwd_kernel": "copies: bytes are its bound",
    "_adder_kernel": "a tile is as many sums as registers hold: instructions, which machine code shows, bound it",
    "_adder_int8_kernel": "a tile is as many sums as registers hold: instructions, which machine code shows, bound it",
    "_adder_dx_kernel": "a tile is as many sums and numbers of x as registers hold: instructions are its bound",
    "_lay_image_kernel": "copies: bytes are its bound",
    "_lay_filters_kernel": "copies: bytes are its bound, and there are few",
    "_sum_channels_kernel": "adds dy up as it reads it: bytes are its bound",
    "_requantize_kernel": "copies: its programs are those of fake_quant, and bytes are its bound",
    "_dequantize_kernel": "copies: a block of 128 K-values, which is how weights are stored, and bytes are its bound",
    "_depthwise_kernel": "each product is a load: a tile is as many pixels as registers hold of its channels",
    "_kv_write_kernel": "a program holds whole tokens of a head: the range of a token comes before its codes",
    "_kv_read_kernel": "copies: a program holds whole tokens of a head, and bytes are its bound",
    "_add_parts_kernel": "adds parts of y, which are at most as many bytes as the weight",
    "_reduce_kernel": "adds parts of y, which are at most as many bytes as the weight",
}


@cache
def spaces() -> dict[str, Space]:
    """Returns every declared space by its op."""
    modules = [f"gs_kernels.{folder}.tune" for folder in OPS]
    tuned = [importlib.import_module(name) for name in modules if importlib.util.find_spec(name) is not None]
    return {space.op: space for module in tuned for space in module.SPACES}


def find_space(op: str) -> Space:
    if op not in spaces():
        raise ValueError(f"gs_kernels.tuning: op must be one of {', '.join(spaces())}, got {op!r}")
    return spaces()[op]
