"""Makes a virtual environment with torch, this package (editable) and its extras: `python3 scripts/environment.py .venv lab`.

The Makefile calls it. Everything has a line with the seconds since the start, and pip's own output is shown where it fails. While pip
installs torch, the C++ kernels are compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import venv
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
START = time.perf_counter()
# Byte code is written by the first import: pip would compile all 12,000 files of torch and its like, of which few are used.
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile", "--root-user-action=ignore")

FIRST_IMPORTS = {
    "lab": "torch, batchnorm.cli.demo, batchnorm.lab.experiments.demo",
    "dev": "torch, batchnorm.cli.demo",
    "models": "torch, batchnorm",
}


def say(line: str) -> None:
    """With the time since the start."""
    print(f"[{time.perf_counter() - START:4.0f} s] {line}", flush=True)


def run(what: str, command: list[str], **variables: str) -> None:
    """Run a command while a clock ticks; end the program with its output if it fails.

    Raises:
        SystemExit: it failed.
    """
    say(what)
    ended = threading.Event()
    ticking = threading.Thread(target=_tick, args=(ended,), daemon=True)
    ticking.start()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    ended.set()
    ticking.join()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if "batchnorm is installed without" in line:
            say(line)


def _tick(ended: threading.Event) -> None:
    """The seconds, in place on a terminal, and elsewhere a line every twenty."""
    terminal = sys.stdout.isatty()
    while not ended.wait(1 if terminal else 20):
        seconds = f"[{time.perf_counter() - START:4.0f} s] ..."
        print(f"\r{seconds}\r" if terminal else seconds, end="" if terminal else "\n", flush=True)


def compile_kernels(python: Path) -> Future[None]:
    """In the background; what fails is said there, and again by the installation."""

    def compile_them() -> None:
        with subprocess.Popen(
            [str(python), "-u", str(ROOT / "scripts" / "kernels.py")], stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or ():
                say(re.sub(r"^\[ *\d+ s\] ", "", line.rstrip()))

    pool = ThreadPoolExecutor(1)
    future = pool.submit(compile_them)
    pool.shutdown(wait=False)
    return future


def main(folder: str, extra: str, constraints: str = "constraints.txt") -> None:
    """Install what `extra` of pyproject.toml names, with torch of the version in `constraints`."""
    environment = ROOT / folder
    python = environment / "bin" / "python"
    if not python.exists():
        say(f"virtual environment {folder}")
        venv.create(environment, with_pip=True)
    pins = (ROOT / constraints).read_text().splitlines()
    torch = [line for line in pins if line.startswith(("torch==", "torchvision=="))]
    compiling = compile_kernels(python)
    # torch goes first and by exact version: as a dependency it would be the newest build, with all of CUDA.
    pinned = ["--constraint", str(ROOT / constraints)]
    run(f"installing {' and '.join(torch)}, 200 MB or more", [str(python), *PIP, *pinned, *torch])
    compiling.result()
    run(f"installing batchnorm[{extra}]", [str(python), *PIP, *pinned, "--editable", f"{ROOT}[{extra}]"])
    # Where the variable forbids byte code, each later process would compile torch's modules anew: 4 s instead of 2.
    run("first import", [str(python), "-c", f"import {FIRST_IMPORTS[extra]}"], PYTHONDONTWRITEBYTECODE="")
    say("installed")


if __name__ == "__main__":
    main(*sys.argv[1:])
