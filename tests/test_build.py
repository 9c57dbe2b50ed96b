"""The build of csrc/: its cache, its choices, and a ceiling on what templates make of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.kernels import cpu

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import kernels  # noqa: E402
import library_size  # noqa: E402

# An instruction set's build has on average 500 KB and 330 functions; before there was a ceiling it had 2 MB and took five times as long.
# The operators and the choice of the build are 78 KB and 100 functions.
MOST_CODE, MOST_FUNCTIONS = 505 * 1024, 400
OPERATORS_CODE, OPERATORS_FUNCTIONS = 80 * 1024, 120


@pytest.mark.skipif(
    not library_size.LIBRARY.exists() or not shutil.which("nm"), reason="needs the library and binutils"
)
def test_the_library_stays_small():
    found, builds = library_size.measure(library_size.LIBRARY), len(cpu.builds())
    assert 100_000 < found.code < OPERATORS_CODE + builds * MOST_CODE
    assert 100 < found.functions < OPERATORS_FUNCTIONS + builds * MOST_FUNCTIONS


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A csrc/ of one file, with a compiler that counts its calls."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text('#include "one.h"\nint one() { return ONE; }\n')
    (tmp_path / "csrc" / "one.h").write_text("#define ONE 1\n")
    (tmp_path / "csrc" / "other.h").write_text("not included\n")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(kernels, "OBJECTS", tmp_path / "objects")
    (tmp_path / "objects").mkdir()

    def compile_it(*flags, version="1"):
        return kernels.Unit("one.cpp", "one", flags).compile((str(compiler),), version)

    compile_it.folder = tmp_path
    return compile_it


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_an_unchanged_source_is_compiled_once(small):
    first, compiled = small("-O1")
    assert compiled
    assert small("-O1") == (first, False)
    assert small("-O2")[1]
    assert small("-O1", version="2")[1]
    (small.folder / "csrc" / "other.h").write_text("changed\n")
    assert not small("-O1")[1]
    (small.folder / "csrc" / "one.h").write_text("#define ONE 2\n")
    assert small("-O1")[1]
    assert len((small.folder / "calls").read_text().splitlines()) == 4


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_failed_compilation_leaves_no_object(small):
    (small.folder / "csrc" / "one.cpp").write_text("this is no C++\n")
    with pytest.raises(RuntimeError, match="failed"):
        small()
    assert not list((small.folder / "objects").iterdir())


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_warning_is_an_error_where_we_say_so_alone(small, monkeypatch):
    (small.folder / "csrc" / "one.cpp").write_text("int one() { int unused; return 1; }\n")
    monkeypatch.delenv("BATCHNORM_WERROR", raising=False)
    assert small(*kernels.common_flags())[1]
    monkeypatch.setenv("BATCHNORM_WERROR", "1")
    with pytest.raises(RuntimeError, match="unused"):
        small(*kernels.common_flags())


TARGETS = {"avx2.h": "x86_64_v3", "avx512.h": "x86_64_v4"}
HEADERS = sorted(path.relative_to(kernels.SOURCES).as_posix() for path in kernels.SOURCES.rglob("*.h"))


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("header", HEADERS)
def test_every_header_stands_alone(header, monkeypatch):
    monkeypatch.setenv("BATCHNORM_WERROR", "1")
    namespace = TARGETS.get(Path(header).name, "baseline")
    target = next((each for each in kernels.INSTRUCTION_SETS if each.namespace == namespace), None)
    if target is None:
        pytest.skip(f"this processor is no {namespace}")
    command = [*kernels.compiler(), *kernels.common_flags(), *target.flags, f"-I{kernels.SOURCES}"]
    alone = [*command, "-fsyntax-only", "-include", header, "-x", "c++", os.devnull]
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_which_builds(monkeypatch):
    monkeypatch.delenv("BATCHNORM_BUILDS", raising=False)
    assert kernels.chosen() == kernels.chosen("all") == kernels.INSTRUCTION_SETS
    monkeypatch.setenv("BATCHNORM_BUILDS", "none")
    with pytest.raises(ValueError, match="must be `host` or `all`; got 'none'"):
        kernels.chosen()


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the C++ kernels")
def test_the_host_is_what_runs_here():
    assert cpu.instruction_set() in {each.name for each in kernels.host()}
    assert cpu.instruction_set() in cpu.builds()


def test_every_build_includes_each_file_once():
    files = [(each.namespace, file) for each in kernels.INSTRUCTION_SETS for file in each.files]
    assert len(files) == len(set(files))
    assert all((ROOT / "csrc" / file).exists() for _, file in files)


def test_without_a_compiler_the_package_says_so(tmp_path):
    environment = {**os.environ, "CXX": "/bin/false", "BATCHNORM_BUILDS": "all"}
    environment.pop("BATCHNORM_REQUIRE_KERNELS", None)
    script = ROOT / "scripts" / "kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "C++ kernels are left out: /bin/false" in done.stdout
    file = [sys.executable, script, tmp_path / "_cpu.so"]  # who asks for a file must not go on with an older one
    assert subprocess.run(file, env=environment, capture_output=True, check=False).returncode == 1
    environment["BATCHNORM_REQUIRE_KERNELS"] = "1"
    assert subprocess.run([sys.executable, script], env=environment, capture_output=True, check=False).returncode == 1
