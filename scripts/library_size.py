"""What the C++ library holds: bytes and functions, for each instruction set and in all. `python scripts/library_size.py [PATH]`.

A function here is an instantiation: templates over dtype, activation, residual, mask, layout and verb multiply, and each one costs
time to compile. tests/test_build.py sets a ceiling. Needs binutils' `size` and `nm`.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "src" / "batchnorm" / "kernels" / "_cpu.so"


@dataclass(frozen=True)
class Size:
    """Of a library or an object file.

    Attributes:
        code: bytes of machine code and constants.
        functions: how many there are.
    """

    code: int
    functions: int


def measure(file: Path) -> Size:
    """Look into a file.

    Raises:
        FileNotFoundError: binutils are not installed.
        subprocess.CalledProcessError: it is no object file.
    """
    sizes = subprocess.run(["size", str(file)], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = subprocess.run(["nm", str(file)], capture_output=True, text=True, check=True).stdout.splitlines()
    return Size(int(sizes[1].split()[0]), sum(line.split()[-2] in "tTW" for line in symbols if line.strip()))


def main() -> None:
    """Print the library's size, and those of the object files that it may have been linked from."""
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    objects = sorted((Path(__file__).parent.parent / "build" / "objects").glob("*.o"))
    for file in (library, *objects):
        found = measure(file)
        print(f"{found.code / 1024:8.0f} KB {found.functions:6d} functions  {file.name}")


if __name__ == "__main__":
    main()
