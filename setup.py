"""Builds the C++ kernels with scripts/kernels.py; everything else about the package stands in pyproject.toml.

Without a C++ compiler the package installs all the same, and says so: as a wheel for any machine, since it has no library then.
An editable install is for this machine, so it builds the kernels for this processor alone unless `BATCHNORM_BUILDS=all`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
import kernels


class BuildLibrary(build_ext):
    """Compiles with any `c++` (or `CXX`), and leaves the library out if that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        which = os.environ.get("BATCHNORM_BUILDS") or ("host" if self.editable_mode else "all")
        sets = kernels.chosen(which)
        try:
            kernels.build(library, sets)
        except (OSError, RuntimeError) as error:
            if os.environ.get("BATCHNORM_REQUIRE_KERNELS"):
                raise
            library.unlink(missing_ok=True)
            print(f"WARNING: batchnorm is installed without its C++ kernels ({error})", file=sys.stderr)  # noqa: T201

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            built, target = Path(self.build_lib, name), Path("src", name)
            target.unlink(missing_ok=True)  # one of older sources must not stay where the build failed
            if built.exists():
                shutil.copy(built, target)


class TagWheel(bdist_wheel):
    """py3-none-<platform>: the library does not know which Python loads it. py3-none-any where there is no library."""

    def run(self) -> None:
        self.run_command("build_ext")
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        command: Any = self.get_finalized_command("build_ext")
        return ("py3", "none", super().get_tag()[2] if command.get_outputs() else "any")


commands: dict[str, Any] = {"build_ext": BuildLibrary, "bdist_wheel": TagWheel}
setup(ext_modules=[Extension("batchnorm.kernels._cpu", ["csrc/dispatch.cpp"])], cmdclass=commands)
