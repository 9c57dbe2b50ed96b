"""Builds csrc/ into one plain shared library: no Python.h, no torch headers, so one wheel serves every Python and every torch.

Everything else about the package stands in pyproject.toml. Without a C++ compiler the package installs all the same, and says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-ffp-contract=fast",  # a · b + c in one rounding
    "-fno-math-errno",
    "-fno-trapping-math",
]

# One build of kernels.cpp for each; dispatch.cpp picks one when it is loaded.
BUILDS = {"run_baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["run_x86_64_v3"] = ["-march=x86-64-v3"]
    BUILDS["run_x86_64_v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    BUILDS["run_x86_64_v4_bf16"] = [*BUILDS["run_x86_64_v4"], "-mavx512bf16", "-DBATCHNORM_EXTENDS=run_x86_64_v4"]


class BuildLibrary(build_ext):
    """Compiles with any `c++` (or `CXX`), two files at a time, and leaves the library out if that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "c++").split()
        extra = os.environ.get("CXXFLAGS", "").split()
        objects = Path(self.build_temp)
        library = Path(self.get_ext_fullpath(ext.name))
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = [
            ("kernels.cpp", f"{name}.o", [f"-DBATCHNORM_ISA={name}", *flags])
            for name, flags in reversed(BUILDS.items())
        ]
        jobs += [("dispatch.cpp", "dispatch.o", []), ("torch_shim.cpp", "torch_shim.o", [])]

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, flags = job
            target = str(objects / name)
            self.spawn([*compiler, *FLAGS, *flags, *extra, "-c", f"csrc/{source}", "-o", target])
            return target

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                targets = list(pool.map(compile_one, jobs))
            self.spawn([*compiler, "-shared", *targets, "-fopenmp", *extra, "-o", str(library)])
        except Exception as error:
            if os.environ.get("BATCHNORM_REQUIRE_KERNELS"):
                raise
            print(f"WARNING: batchnorm is installed without its C++ kernels ({error})", file=sys.stderr)  # noqa: T201

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            built = Path(self.build_lib, name)
            if built.exists():
                shutil.copy(built, Path("src", name))


class TagWheel(bdist_wheel):
    """py3-none-<platform>: the library does not know which Python loads it."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": TagWheel}
setup(ext_modules=[Extension("batchnorm.kernels._cpu", ["csrc/kernels.cpp"])], cmdclass=commands)
