"""Times ops beside their peers, and what a call is made of: its kernels, one by one, and tiles that are forced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from bench import record
from bench.gpu.items import Context, Failed, Item, Row
from bench.peers import own_bytes, peers
from bench.peers.qconv2d import float_conv2d
from bench.peers.qmatmul import float_linear
from bench.roofline import peak_of
from bench.run import Job, measure
from bench.timing import summarize
from gs_kernels.aot.collect import spec_call
from gs_kernels.runtime.opspec import Case
from gs_kernels.tuning.space import Machine, Problem, Tile, find_space
from gs_kernels.tuning.tables import forced
from gs_kernels.tuning.tuner import measure as measure_tiles

FLOATS = {"float_linear": float_linear, "float_conv2d": float_conv2d}
MACHINE = Machine(90, 132)  # whose tiles are compiled ahead of a run


def meta_case(job: Job) -> Case:
    case = job.spec.make(job.shape, job.dtype, torch.device("meta"), torch.Generator())
    return case if job.direction == "f+b" else replace(case, grad_args=())


@dataclass(frozen=True)
class Timed(Item):
    """Times a job of `bench.run`. beside: the peers that are timed with it."""

    job: Job = None  # type: ignore[assignment]
    beside: tuple[str, ...] = ()

    def run(self, context: Context) -> Iterator[Row]:
        without = {"torch", "compile", *peers(self.job.spec.name)} - set(self.beside)
        bandwidth, trouble = context.ceilings["copy_gbps"], "is not there"
        for row in measure(self.job, context.device, bandwidth, context.peaks, context.seconds, without=tuple(without)):
            yield {"kind": "op", **record.environment(context.device), **row}
            if row["provider"] == "ours":
                trouble = row.get("error", "" if "ms_p50" in row else f"differs in {row['mismatch']:.2%} of elements")
        if trouble:
            raise Failed(trouble)

    def make_up(self, context: Context) -> Iterator[Row]:
        job, (nbytes, flops) = self.job, self.job.cost()
        peak, bandwidth = peak_of(job.spec.name, context.peaks), context.ceilings["copy_gbps"]
        for i, name in enumerate(("ours", *self.beside)):
            moved = own_bytes(job.spec.name, name, meta_case(job), nbytes)
            ms = 3e-3 + 1.1 * max(moved / bandwidth / 1e6, flops / peak / 1e9) * (1 + i)
            about: Row = {"op": job.spec.name, "group": job.group, "shape": job.shape, "direction": job.direction}
            about |= {"dtype": str(job.dtype).removeprefix("torch."), "provider": name, "agrees": True}
            tflops, gbps = flops / ms / 1e9, moved / ms / 1e6
            rates = {"tflops": round(tflops, 3), "percent_of_peak": round(100 * tflops / peak, 1)}
            if moved:
                rates |= {"gbps": round(gbps, 1), "percent_of_copy": round(100 * gbps / bandwidth, 1)}
            yield {"kind": "op", **about, **asdict(summarize([ms])), **rates}

    def launch(self, context: Context) -> None:
        spec_call(self.job.spec, meta_case(self.job), torch.contiguous_format)()
        for name in self.beside:
            if name in FLOATS and "x_scale" not in meta_case(self.job).kwargs:
                case = meta_case(self.job)
                FLOATS[name](*case.args, **case.kwargs)


@dataclass(frozen=True)
class Kernels(Item):
    """Tells the kernels of a call apart: microseconds of each, by the profiler."""

    job: Job = None  # type: ignore[assignment]

    def run(self, context: Context) -> Iterator[Row]:
        case = self.job.make(context.device, 1)[0]
        call = partial(self.job.spec.run, *case.args, **case.kwargs)
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(20):
                call()
            torch.cuda.synchronize()
        found = {e.key: round(e.device_time_total / 20, 2) for e in profile.key_averages() if e.device_time_total > 0}
        if not found:
            raise Failed("the profiler saw no kernel")
        yield {"kind": "kernels", "op": self.op, "shape": self.job.shape, "us": found}

    def make_up(self, context: Context) -> Iterator[Row]:
        yield {
            "kind": "kernels",
            "op": self.op,
            "shape": self.job.shape,
            "us": {"_kernel": 10.0, "_reduce_kernel": 3.0},
        }

    def launch(self, context: Context) -> None:
        spec_call(self.job.spec, meta_case(self.job))()


def tile_row(op: str, problem: Problem, tile: Tile, found: float | str) -> Row:
    result = {"us": found} if isinstance(found, float) else {"error": found}
    return {"kind": "tile", "op": op, "problem": problem, "tile": tile, **result}


@dataclass(frozen=True)
class Forced(Item):
    """Times tiles of a problem against each other, without a table."""

    problem: Problem = None  # type: ignore[assignment]
    tiles: tuple[Tile, ...] = ()

    def run(self, context: Context) -> Iterator[Row]:
        rows: list[Row] = []
        note: Any = lambda tile, found: rows.append(tile_row(self.op, self.problem, tile, found))  # noqa: E731
        for tile in self.tiles:
            measure_tiles(find_space(self.op), self.problem, [tile], context.device, note)
            yield rows[-1]
        if all("error" in row for row in rows):
            raise Failed(rows[-1]["error"])

    def make_up(self, context: Context) -> Iterator[Row]:
        for i, tile in enumerate(self.tiles):
            yield tile_row(self.op, self.problem, tile, 10.0 + i)

    def launch(self, context: Context) -> None:
        space = find_space(self.op)
        operands = space.make(self.problem, "meta")
        for tile in (*self.tiles, space.reference(self.problem, MACHINE)):
            with forced(self.op, tile):
                space.run(self.problem, operands, MACHINE)
