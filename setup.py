"""Builds the C++ kernels when the package is installed: what pyproject.toml cannot say.

Without a compiler the package installs all the same; a process that needs the kernels then says once what is slower.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

spec = importlib.util.spec_from_file_location("build_kernels", Path(__file__).parent / "gs_kernels/cpu/compile.py")
build_kernels = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build_kernels
spec.loader.exec_module(build_kernels)

EXTENSIONS = {
    f"gs_kernels.cpu.{build_kernels.file_name(name).removesuffix('.so')}": name
    for name in build_kernels.instruction_sets()
}


class BuildKernels(build_ext):
    """Compiles plain libraries, no Python modules."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        name, target = EXTENSIONS[ext.name], Path(self.get_ext_fullpath(ext.name))
        built = build_kernels.FOLDER / build_kernels.file_name(name)
        if build_kernels.is_current(built, name):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
            return
        try:
            build_kernels.build(name, target)
        except build_kernels.BuildError as error:
            raise CompileError(f"{error}; what runs on CPUs will be slower") from error


class AnyPython(bdist_wheel):
    """Names the wheel for the architecture alone: nothing in the libraries depends on a version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(name, [], optional=True) for name in EXTENSIONS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
