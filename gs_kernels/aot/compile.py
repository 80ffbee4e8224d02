"""Compiles kernel launches for a GPU that is not there, through the specialisation of a real launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gs_kernels.aot.targets import Target, find_target
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.torch_private import triton_launches_directly


class _StubDriver:
    """Answers what Triton asks of a driver before it compiles: which device, which stream, which target."""

    def __init__(self, target: Target, device: str) -> None:
        self.target, self.device = target, device

    def get_current_device(self) -> str:
        # kernels cache their code per device: a device name of our own keeps that of real GPUs apart
        return f"{self.device}:{self.target.name}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)


@dataclass(frozen=True)
class Launch:
    """Describes one `kernel[grid](...)`. compiled: what Triton made of it. args: by name, with flags and blocks."""

    compiled: Any
    grid: tuple[int, ...]
    args: dict[str, Any]


@contextlib.contextmanager
def compile_launches(target: str) -> Iterator[list[Any]]:
    """Compiles every `kernel[grid](...)` inside for `target` and launches nothing; yields the compiled kernels.

    Call launchers with meta tensors: no memory is touched, and their data pointers count as 16-byte aligned.
    A kernel that is launched twice with the same specialisation is listed once.

    Args:
        target: a name of `gs_kernels.aot.TARGETS`, e.g. "sm_90".

    Raises:
        ValueError: if the target is unknown.
        RuntimeError: under TRITON_INTERPRET=1, where `@triton.jit` makes functions that cannot be compiled.
    """
    compiled: list[Any] = []

    def note(launch: Launch) -> None:
        if not any(launch.compiled is other for other in compiled):
            compiled.append(launch.compiled)

    with intercept(target, note):
        yield compiled


@contextlib.contextmanager
def record_launches(target: str) -> Iterator[list[Launch]]:
    """Does as `compile_launches`, and yields the list of all launches, in their order."""
    launches: list[Launch] = []
    with intercept(target, launches.append):
        yield launches


@contextlib.contextmanager
def intercept(
    target: str, note: Callable[[Launch], None], instead_of_compiling: Callable[..., None] | None = None
) -> Iterator[None]:
    """Launches inside are for `target`, which need not be there, and end with `note`.

    instead_of_compiling: called with what `JITFunction._do_compile` is, the function first; then launches have no code.
    """
    stub = _StubDriver(find_target(target), "aot" if instead_of_compiling is None else "collect")
    if INTERPRET:
        raise RuntimeError(
            "gs_kernels.aot: needs a process where kernels compile, got TRITON_INTERPRET=1; unset it and start again"
        )
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        note(Launch(kernel, tuple(grid), dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return kernel

    before = driver._active
    driver.set_active(stub)
    JITFunction.run = compile_only
    if instead_of_compiling is not None:
        JITFunction._do_compile = instead_of_compiling
    try:
        with triton_launches_directly():
            yield
    finally:
        JITFunction.run, JITFunction._do_compile = launch, do_compile
        driver._active = before


@contextlib.contextmanager
def skip_launches() -> Iterator[None]:
    """Keeps every `kernel[grid](...)` inside from compiling and launching: only what is around it happens."""
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: None
    try:
        yield
    finally:
        JITFunction.run = before
