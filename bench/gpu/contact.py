"""Checks first one small call or a few of each kind of kernel against its reference. What fails is not timed.

They run on a CPU as well, where a dry run makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.agree import agreement, outputs_of, step
from bench.gpu.items import Context, Failed, Item, Row
from gs_kernels.aot.collect import spec_call
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import unpack_codes
from gs_kernels.qmatmul.op import qmatmul
from gs_kernels.qmatmul.spec import make_weight, shape
from gs_kernels.runtime.opspec import Case, OpSpec, Shape, specs

BF16 = torch.bfloat16
ROWS = (1, 16, 64, 256, 1024)
N, K = 48, 1024  # K is split between programs where there are few rows; on a CPU too small for a compiler to be asked


@dataclass(frozen=True)
class Check(Item):
    """Compares calls of an op, and their gradients, with its reference. shapes: of the spec named `spec`."""

    spec: str = ""
    shapes: tuple[Shape, ...] = ()
    dtype: torch.dtype = BF16
    gradient: bool = False

    def _cases(self, device: str) -> Iterator[tuple[OpSpec, Shape, Case]]:
        spec = next(spec for spec in specs() if spec.name == self.spec)
        for s in self.shapes:
            generator = torch.Generator(device).manual_seed(0)
            case = spec.make(s, self.dtype, torch.device(device), generator)
            yield spec, s, case if self.gradient else replace(case, grad_args=())

    def run(self, context: Context) -> Iterator[Row]:
        wrong = []
        for spec, s, case in self._cases(context.device):
            for i in case.grad_args:
                case.args[i].requires_grad_()
            generator = torch.Generator(context.device).manual_seed(1)
            draw: dict[str, Any] = {"device": context.device, "generator": generator}
            ys = outputs_of(spec.ref(*case.args, **case.kwargs)) if self.gradient else []
            dys = [torch.randn(y.shape, dtype=y.dtype, **draw) for y in ys if y.is_floating_point()]
            tol, grad_tol = spec.tol[self.dtype], spec.grad_tol.get(self.dtype, 1e-5)
            found = agreement(spec.run, case, dys, step(spec.ref, case, dys), tol, grad_tol)
            about = {"shape": s, "mismatch": found.mismatch, "grad_error": found.grad_error}
            yield {"kind": "contact", "op": self.op, "bits": self.bits, "agrees": found.full, **about}
            if not found.full:
                wrong.append(f"x={tuple(s['x'])}: {found.mismatch:.2%} of elements, gradients {found.grad_error:.1e}")
        if wrong:
            raise Failed("differs from its reference: " + "; ".join(wrong))

    make_up = run

    def launch(self, context: Context) -> None:
        for spec, _, case in self._cases("cpu"):
            spec_call(spec, case, torch.contiguous_format)()


class Subnormals(Item):
    """Codes are subnormal bf16 numbers before they are scaled up: a chip that takes them for 0 makes a weight of zeros.

    Rows of x that pick single columns of a weight give its numbers as they are.
    """

    def run(self, context: Context) -> Iterator[Row]:
        for bits in (4, 2, 1):
            x, w = _columns(bits, context.device)
            got, wanted = qmatmul(x, w).float(), _first_columns(w)
            zeros = _first_columns(replace(w, codes=torch.zeros_like(w.codes)))
            flushed, equal = torch.equal(got, zeros), torch.allclose(got, wanted, rtol=2**-7, atol=1e-6)
            yield {"kind": "contact", "op": "qmatmul", "bits": bits, "agrees": equal, "flushed": flushed}
            if flushed:
                raise Failed(f"subnormal bf16 numbers are flushed to 0: all {bits}-bit codes came out as 0")
            if not equal:
                raise Failed(f"{bits}-bit weights differ by up to {(got - wanted).abs().max():.1e}")

    make_up = run

    def launch(self, context: Context) -> None:
        for bits in (4, 2, 1):
            x, w = _columns(bits, "meta")
            qmatmul(x, w)


def _columns(bits: int, device: str) -> tuple[Tensor, PackedWeight]:
    generator = torch.Generator() if device == "meta" else torch.Generator(device).manual_seed(0)
    about = shape((16, K), N, bits, 128, "half" if bits == 1 else "middle")
    return torch.eye(16, K, dtype=BF16, device=device), make_weight(about, torch.device(device), generator, BF16)


def _first_columns(weight: PackedWeight) -> Tensor:
    """Returns the first 16 columns `[16, N]` of a weight, by torch alone, rounded as the kernels round weights."""
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)[:, :16].float()
    zero = weight.zero[:, :1].float() if isinstance(weight.zero, Tensor) else weight.zero
    return ((codes - zero) * weight.scale[:, :1].float()).to(BF16).float().t()


def _products(spec: str, op: str, bits: int, group: int, rows: tuple[int, ...], **more: object) -> Check:
    about = tuple(shape((m, K), N, bits, group, bias=False) for m in rows)
    name = f"contact/{op}-w{bits}-{'channel' if group == K else f'g{group}'}-m{'-'.join(map(str, rows))}"
    return Check(name, op, bits, spec, about, **more)  # type: ignore[arg-type]


def _some(spec: str, *numbers: int, name: str, gradient: bool = False, dtype: torch.dtype = BF16) -> Check:
    """Checks test shapes of the spec of an op, by their numbers."""
    shapes = next(known for known in specs() if known.name == spec).test_shapes
    return Check(f"contact/{name}", spec, 0, spec, tuple(shapes[i] for i in numbers), dtype, gradient)


ITEMS: tuple[Item, ...] = (
    Subnormals("contact/bf16-subnormals", "qmatmul"),
    *(_products("qmatmul", "qmatmul", bits, 128, ROWS) for bits in (4, 2, 1, 8)),
    _products("qmatmul", "qmatmul", 4, K, ROWS),
    _products("qmatmul", "qmatmul", 4, 128, (1, 16), dtype=torch.float32),
    _products("qmatmul_fp8", "qmatmul_fp8", 4, 128, ROWS),
    _products("qmatmul_fp8", "qmatmul_fp8", 4, K, ROWS),
    _products("qmatmul_int8", "qmatmul_int8", 8, K, (1,)),
    _products("qmatmul_int8", "qmatmul_int8", 4, 128, ROWS),
    _some("quantize_rows", 1, 2, 3, name="quantize-rows"),
    _some("qconv2d", 1, 2, 5, name="conv-bf16"),
    _some("qconv2d", 6, name="conv-depthwise"),
    _some("qconv2d_int8", 1, 2, 7, name="conv-int8"),
    _some("fake_quant", 2, 3, 9, name="fake-quant"),
    _some("fake_quant", 3, 5, 8, name="fake-quant-lsq", gradient=True),
    _some("minmax", 1, 2, name="observe"),
    _some("slb_weight", 1, 3, name="slb"),
    _some("slb_weight", 1, 3, name="slb-gradient", gradient=True),
)
