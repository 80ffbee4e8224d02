"""Collects what launches ask Triton to compile, without compiling it: `collect(call, "sm_90")`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gs_kernels.aot.compile import intercept
from gs_kernels.runtime.dispatch import meta_tensors_run_kernels
from gs_kernels.runtime.opspec import Case, OpSpec, map_tensors


@dataclass(frozen=True, eq=False)
class Specialization:
    """Holds all that Triton knows of a kernel when it compiles it for a launch.

    fn: the `@triton.jit` function. signature: type of each argument by name, "constexpr" among them. constexprs: value
    of each constant by its path, e.g. `(3,)` for the fourth argument. attrs: what is known of arguments, by path.
    options: number of warps and the like, an object of Triton's. target: its `GPUTarget`. key: of Triton's own, equal
    for launches that share their code.
    It can be pickled, if its function is found by its name in its module.
    """

    fn: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any
    target: Any
    key: str

    @property
    def name(self) -> str:
        """Returns the name of the kernel."""
        return str(self.fn.__name__)

    def compile(self) -> Any:
        """Compiles to machine code, into Triton's cache: a launch in another process finds it there."""
        from triton import compile
        from triton.compiler import ASTSource

        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        return compile(source, target=self.target, options=self.options.__dict__)

    def lower(self, last: str = "ttir") -> tuple[Any, dict[str, Any]]:
        """Runs the compiler only as far as a stage of it; nothing is kept.

        Args:
            last: "source" is what its front end makes, then follow "ttir", "ttgir", "llir", "ptx" and "cubin".

        Returns:
            what the stage made, and what the compiler noted about the kernel on its way.
        """
        from triton._C.libtriton import ir
        from triton.compiler import ASTSource, make_backend

        backend, context = make_backend(self.target), ir.context()
        stages: dict[str, Callable[..., Any]] = {}
        metadata = {"target": self.target, **self.options.__dict__}
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        backend.add_stages(stages, self.options, source.language)
        functions, modules = backend.get_codegen_implementation(self.options), backend.get_module_map()
        module = source.make_ir(self.target, self.options, functions, modules, context)
        if last == "source":
            return module, metadata
        for name, stage in stages.items():
            module = stage(module, metadata)
            if name == last:
                return module, metadata
        raise ValueError(f"gs_kernels.aot: stage must be one of source, {', '.join(stages)}, got {last!r}")

    def shared_bytes(self) -> int:
        """Computes how much shared memory a block takes on an NVIDIA GPU, without making machine code."""
        from triton._C.libtriton import ir, nvidia, passes
        from triton.backends.nvidia.compiler import get_ptx_version_from_options

        module, _ = self.lower("ttgir")
        manager, arch = ir.pass_manager(module.context), self.target.arch
        passes.convert.add_scf_to_cf(manager)
        passes.gluon.add_inliner(manager)
        version = get_ptx_version_from_options(self.options, arch)
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, version)
        manager.run(module, "shared_bytes")
        return int(module.get_int_attr("ttg.shared"))

    def with_argument(self, name: str, type_: str, value: int | None = None) -> Specialization:
        """Returns the kernel for another type of an argument, or for a constant value of it ("constexpr")."""
        path = (list(self.signature).index(name),)
        constexprs = {p: v for p, v in self.constexprs.items() if p != path}
        if type_ == "constexpr":
            constexprs[path] = value
        attrs = {p: v for p, v in self.attrs.items() if p != path}
        return replace(self, signature=self.signature | {name: type_}, constexprs=constexprs, attrs=attrs)

    def __reduce__(self) -> Any:
        rest = (self.signature, self.constexprs, self.attrs, self.options, self.target, self.key)
        return _found, (self.fn.__module__, self.name, *rest)


def _found(module: str, name: str, *rest: Any) -> Specialization:
    return Specialization(getattr(importlib.import_module(module), name), *rest)


@contextlib.contextmanager
def collect_launches(target: str) -> Iterator[list[Specialization]]:
    """Keeps every `kernel[grid](...)` inside from launching and compiling; yields what would be compiled, each once.

    Meta tensors count as tensors of the target: ops run their launchers for them, and refuse what those refuse.

    Args:
        target: a name of `gs_kernels.aot.TARGETS`, e.g. "sm_90".

    Raises:
        ValueError: if the target is unknown.
        RuntimeError: under TRITON_INTERPRET=1, where `@triton.jit` makes functions that cannot be compiled.
    """
    found: dict[tuple[int, str], Specialization] = {}
    kernels: list[Specialization] = []

    def note(
        fn: Any, key: str, signature: Any, device: str, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        if (id(fn), key) not in found:
            gpu = fn.device_caches[device][2]
            found[id(fn), key] = Specialization(fn, signature, constexprs, attrs, options, gpu, key)
            kernels.append(found[id(fn), key])

    with intercept(target, lambda launch: None, note), meta_tensors_run_kernels():
        yield kernels


def collect(call: Callable[[], Any], target: str) -> list[Specialization]:
    """Lists what a call of public ops with meta tensors, or of launchers, would have Triton compile, each kernel once.

    Args:
        call: may have a backward pass inside.
        target: a name of `gs_kernels.aot.TARGETS`.
    """
    with collect_launches(target) as kernels:
        call()
    return kernels


def on_meta(t: Tensor) -> Tensor:
    """Makes a tensor with the size and the strides of t, and no memory; it wants a gradient if t does."""
    meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return meta.requires_grad_(t.requires_grad)


def spec_call(
    spec: OpSpec, case: Case, of_gradients: torch.memory_format = torch.preserve_format
) -> Callable[[], None]:
    """Makes a call of the case of an op on meta tensors, with a backward pass where one is wanted.

    of_gradients: the memory format of the gradients of results, by default that of the results.
    """
    args = [map_tensors(on_meta, a) for a in case.args]
    kwargs = {name: map_tensors(on_meta, a) for name, a in case.kwargs.items()}
    wanted = [args[i].requires_grad_() for i in case.grad_args]

    def call() -> None:
        ys = spec.run(*args, **kwargs)
        ys = [y for y in (ys if isinstance(ys, tuple | list) else (ys,)) if y is not None and y.requires_grad]
        if wanted and ys:
            dys = [torch.empty_like(y, memory_format=of_gradients) for y in ys]
            torch.autograd.grad(ys, wanted, dys, allow_unused=True)

    return call
