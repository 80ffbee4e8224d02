"""Two GPUs that are not there, for tests of bound calls: what is launched on them is noted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from gs_algos.quant.packed import module
from gs_kernels import pack_weight
from gs_kernels.runtime import bound_calls, device, torch_op
from gs_kernels.runtime.device import Capabilities


class Gpu:
    """Two GPUs, as far as Triton's JIT and gs_kernels ask: kernels are specialized, not compiled, and launch nothing.

    launches: (kernel, what it was specialized by, GPU, grid, stream, arguments) of each.
    """

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.present, self.stream, self.capturing = 0, 0, False
        self.first: set[int] | None = None  # addresses of memory on the first GPU, if not all is

    def index_of(self, t: torch.Tensor) -> int:
        return int(self.first is not None and t.untyped_storage().data_ptr() not in self.first)

    @contextlib.contextmanager
    def on(self, index):
        before, self.present = self.present, int(getattr(index, "index", index) or 0)
        try:
            yield
        finally:
            self.present = before

    def run(self, call, *, long_way: bool = False):
        """The launches of a call; operands are compared by address, what the call allocates by its size."""
        self.launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            if long_way:
                patch.setattr(torch_op, "launches_directly", lambda: False)
            call()
        return list(self.launches)


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    gpu = Gpu()

    class Kernel(CompiledKernel):
        def __init__(self, fn, key):
            self.module, self.function, self.packed_metadata, self.name = 1, (fn.__name__, key), (), fn.__name__
            self.src, self._module_pid = None, None
            self.index = gpu.present
            self._run = self.launch

        def launch(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            if enter is not None and enter.calls:
                enter(launch_metadata)
            assert gpu.present == self.index  # a kernel is loaded into the context of one GPU
            shown = [(a.dtype, a.data_ptr() if keep(a) else a.numel()) if torch.is_tensor(a) else a for a in args]
            gpu.launches.append((*self.function, self.index, (x, y, z), stream, shown))

        def __del__(self):
            pass

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = self.device_caches[device][0][key] = Kernel(self, key)
        return kernel

    gpu.kept = set()
    keep = lambda t: t.untyped_storage().data_ptr() in gpu.kept  # noqa: E731
    name = object()  # of our own in the caches of kernels
    stub = SimpleNamespace(
        get_current_device=lambda: (name, gpu.present),
        get_current_stream=lambda index: gpu.stream,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(device, "on_gpu", torch.Tensor.is_cpu.__get__)
    monkeypatch.setattr(device, "index_of", gpu.index_of)
    monkeypatch.setattr(device, "current_index", lambda: gpu.present)
    monkeypatch.setattr(device, "capabilities", lambda index=0: Capabilities("NVIDIA H200", 90, 132))
    monkeypatch.setattr(device, "capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "device", gpu.on)
    monkeypatch.setattr(module, "KERNEL_DEVICES", ("cpu",))
    bound_calls.forget()
    yield gpu
    bound_calls.forget()


def kept(gpu, *tensors):
    gpu.kept |= {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    return tensors if len(tensors) > 1 else tensors[0]


def weight(n=64, k=256, group=128, *, bits=4, dtype=torch.bfloat16, points=False):
    codes = torch.arange(n * k, dtype=torch.int32).view(n, k).remainder(1 << bits).to(torch.uint8)
    scale = torch.full((n, k // group), 0.5, dtype=dtype)
    zero = torch.arange(scale.numel()).view(scale.shape).remainder(3).to(dtype) if points else float(1 << (bits - 1))
    return pack_weight(codes, scale, zero, bits=bits, group_size=group, layout="planar")


def rows(m, k, *, offset=0, step=0, dtype=torch.bfloat16):
    """`[m, k]`, `offset` elements behind an address that is a multiple of 64, rows `step` elements further apart."""
    return torch.ones(m * (k + step) + offset, dtype=dtype)[offset:].view(m, k + step)[:, :k]


def pointers(launches):
    return {a[1] for launch in launches for a in launch[5] if isinstance(a, tuple)}
