"""Compiles csrc/ into one plain shared library: no Python.h, no torch headers, so one wheel serves every Python and every torch.

`setup.py` calls `build`. `python scripts/kernels.py` fills the object cache alone, which the Makefile does while pip installs torch;
with a path it links the library too, for those who work on csrc/: `python scripts/kernels.py src/batchnorm/kernels/_cpu.so`.
`python scripts/kernels.py --fuzzer build/fuzz` links the program of csrc/fuzz.cpp, with the same flags.
An object is compiled once: build/objects/ holds each under a key of its sources, flags and compiler.

    BATCHNORM_BUILDS   `all`: a build for each instruction set; `host`: the one that this processor runs. Default: `all`
    BATCHNORM_WERROR   not empty: a warning is an error, as in continuous integration; an installation survives a newer compiler's
    CXX, CXXFLAGS      the compiler, and flags to add
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"

FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a · b + c in one rounding
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
# Apple's clang has no OpenMP; the kernels use the standard library's threads there.
OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)

FLOAT, HALF = "kernels/kernels_float.cpp", "kernels/kernels_half.cpp"
# The files that call the kernels: the library of operators, and the program that looks for faults.
OPERATORS, FUZZER = "torch/torch_shim.cpp", "fuzz.cpp"
V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")


@dataclass(frozen=True)
class InstructionSet:
    """A build of the kernels: its name in C++, what `batchnorm env` calls it, and the files compiled for it."""

    namespace: str
    name: str
    flags: tuple[str, ...] = ()
    files: tuple[str, ...] = (FLOAT, HALF)


BASELINE = InstructionSet("baseline", "baseline")
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS = (
        BASELINE,
        InstructionSet("x86_64_v3", "AVX2", ("-march=x86-64-v3",)),
        InstructionSet("x86_64_v4", "AVX-512", V4),
        # Converts to bfloat16 in one instruction; the rest is as in the build before.
        InstructionSet("x86_64_v4_bf16", "AVX-512 BF16", (*V4, "-mavx512bf16"), (HALF,)),
    )
else:
    INSTRUCTION_SETS = (BASELINE,)


@dataclass(frozen=True)
class Unit:
    """One call of the compiler."""

    file: str
    label: str
    flags: tuple[str, ...]

    def compile(self, compiler: tuple[str, ...], version: str) -> tuple[Path, bool]:
        """The object file, and whether it had to be compiled."""
        target = OBJECTS / f"{Path(self.file).stem}-{self._key(compiler, version)}.o"
        if target.exists():
            return target, False
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*compiler, *self.flags, f"-I{SOURCES}", "-c", str(SOURCES / self.file), "-o", str(partial)])
        partial.replace(target)
        return target, True

    def _key(self, compiler: tuple[str, ...], version: str) -> str:
        digest = hashlib.sha256(repr((compiler, version, self.file, self.flags)).encode())
        for name in sorted(_with_headers(self.file)):
            digest.update(name.encode() + (SOURCES / name).read_bytes())
        return digest.hexdigest()[:24]


def _with_headers(file: str) -> set[str]:
    """A source and the headers it includes, directly or not."""
    found, left = set[str](), [file]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += re.findall(r'^#include "([^"]+)"', (SOURCES / name).read_text(encoding="utf-8"), re.MULTILINE)
    return found


def compiler() -> tuple[str, ...]:
    """The C++ compiler's command."""
    return tuple(os.environ.get("CXX", "c++").split())


def chosen(which: str | None = None) -> tuple[InstructionSet, ...]:
    """The instruction sets of `BATCHNORM_BUILDS`, or of `which`.

    Raises:
        ValueError: it is neither `all` nor `host`.
    """
    which = which or os.environ.get("BATCHNORM_BUILDS") or "all"
    if which == "all":
        return INSTRUCTION_SETS
    if which != "host":
        raise ValueError(f"BATCHNORM_BUILDS must be `host` or `all`; got {which!r}")
    return host()


def host() -> tuple[InstructionSet, ...]:
    """What the fastest build for this processor needs: dispatch.cpp chooses in the same order."""
    native = [] if len(INSTRUCTION_SETS) == 1 else ["-march=native"]
    output = _run([*compiler(), *native, "-dM", "-E", "-x", "c++", os.devnull])
    macros = {line.split()[1] for line in output.splitlines() if line.startswith("#define ")}
    if len(INSTRUCTION_SETS) == 1 or not {"__AVX2__", "__FMA__", "__BMI2__"} <= macros:
        return (BASELINE,)
    _, v3, v4, bf16 = INSTRUCTION_SETS
    if not {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= macros:
        return (v3,)
    return (v4, bf16) if "__AVX512BF16__" in macros else (v4,)


def common_flags() -> tuple[str, ...]:
    """Those of every file and instruction set."""
    werror = ("-Werror",) if os.environ.get("BATCHNORM_WERROR") else ()
    return (*FLAGS, *werror, *OPENMP, *os.environ.get("CXXFLAGS", "").split())


def units(sets: tuple[InstructionSet, ...], caller: str = OPERATORS) -> list[Unit]:
    """Everything to compile, the slowest first: the kernels and the files on top of them."""
    common = common_flags()
    kernels = [
        Unit(file, f"{each.name}, {'float32 and float64' if file is FLOAT else 'bfloat16 and float16'}", flags)
        for file in (FLOAT, HALF)
        for each in sets
        if file in each.files
        for flags in [(*common, *each.flags, f"-DBATCHNORM_ISA={each.namespace}")]
    ]
    return [*kernels, *(Unit(file, Path(file).stem, common) for file in (caller, "dispatch.cpp", "threads.cpp"))]


def compile_all(sets: tuple[InstructionSet, ...], caller: str = OPERATORS) -> list[Path]:
    """Compile what is not in the cache, as many files at a time as there are processors, and say so; the objects."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    start, command = time.perf_counter(), compiler()
    version = _run([*command, "--version"])

    def compile_one(unit: Unit) -> Path:
        target, compiled = unit.compile(command, version)
        if compiled:
            _say(f"[{time.perf_counter() - start:4.0f} s] compiled: {unit.label}")
        return target

    names = " and ".join(each.name for each in sets)
    _say(f"C++ kernels for {names}{'' if len(sets) == len(INSTRUCTION_SETS) else ', this processor'}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, units(sets, caller)))


def build(target: Path, sets: tuple[InstructionSet, ...], caller: str = OPERATORS) -> None:
    """Compile and link the library, or the fuzzer.

    Raises:
        RuntimeError: the compiler failed; the message has what it printed.
        FileNotFoundError: there is no compiler.
    """
    objects = compile_all(sets, caller)
    target.parent.mkdir(parents=True, exist_ok=True)
    shared = ["-shared"] if caller == OPERATORS else []
    extra = os.environ.get("CXXFLAGS", "").split()
    _run([*compiler(), *shared, *map(str, objects), *OPENMP, *extra, "-o", str(target)])


def _run(command: list[str]) -> str:
    """What it printed on stdout."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--fuzzer"]:
            build(Path(sys.argv[2]), chosen(), FUZZER)
        elif len(sys.argv) > 1:
            build(Path(sys.argv[1]), chosen())
        else:
            compile_all(chosen())
    except (OSError, RuntimeError) as error:
        _say(f"The C++ kernels are left out: {error}")
        asked_for_a_file = len(sys.argv) > 1
        sys.exit(asked_for_a_file or bool(os.environ.get("BATCHNORM_REQUIRE_KERNELS")))
