"""Everything that needs a GPU, in ten minutes: tests, benchmarks, and a verdict for each target, in runs/gpu/. `make gpu` runs it.

It needs torch 2.11 or newer for this GPU, its Triton, this package (pip install -e .[cli]) and pytest with pytest-xdist. Without a GPU it
says so, and exits with 2. Each check is a process with a time limit of its own; runs/gpu/verdict.md is written after each of them, so
what has run by then is kept if the machine is taken away.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "gpu"
SECONDS = 570  # for all
AT_LEAST = 5  # seconds, below which a check is not begun
TO_END = 15  # seconds in which an interrupted check writes what it has
WHOLE_SUITE = ("hypothesis", "matplotlib", "mkdocs", "onnx", "gymnasium", "nbclient")  # packages of the extra `dev`


class Check(NamedTuple):
    """A command, how many seconds it may take, and what it sets in the environment."""

    name: str
    command: list[str]
    seconds: int
    variables: dict[str, str]


def checks() -> list[Check]:
    """In the order of what is most worth knowing, should time run out."""
    on_device = {"BATCHNORM_TEST_DEVICE": "cuda"}
    workers = max(min(os.cpu_count() or 1, 12), 1)  # Triton compiles some hundred programs, on the CPU

    def tests(arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments.split()]

    def bench(arguments: str, file: str) -> list[str]:
        command = [sys.executable, "-m", "batchnorm", "bench", "--device", "cuda", "--force", *arguments.split()]
        return [*command, "--json", str(OUT / f"{file}.json")]

    shapes = "--suite resnet50 --batch 256 --dtype bfloat16 --direction forward,backward,step --minutes 1.2"
    steps = "--model resnet50 --layout channels_last --batch 256 --rounds 12 --outputs warm --fuse"
    compiled = "--suite resnet50 --batch 256 --quick --dtype bfloat16 --direction step --outputs flushed --provider compile,ours"
    threshold = [sys.executable, "benchmarks/gpu_threshold.py", "--json", str(OUT / "threshold.json")]
    found = [
        Check(
            "kernels on the device",
            tests(f"-n {workers} --dist worksteal tests/gpu --ignore=tests/gpu/test_ahead_of_time.py"),
            150,
            on_device,
        ),
        Check("every shape of ResNet-50", bench(shapes, "resnet50"), 130, {}),
        Check("training steps of ResNet-50", bench(steps, "model"), 80, {}),
        Check("against torch.compile", bench(f"{compiled} --minutes 0.3", "compile"), 80, {}),
        Check("from which size on", threshold, 40, {}),
        Check("layers, as on the CPU", tests(f"-n {workers} tests/test_layers.py tests/test_functional.py"), 60, {}),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        few = tests("tests/gpu/test_programs.py -k pairs")
        found.append(Check("compute-sanitizer", [sanitizer, "--error-exitcode", "9", *few], 120, on_device))
    if all(importlib.util.find_spec(name) is not None for name in WHOLE_SUITE):
        whole = tests(f"-n {workers} --dist worksteal tests --ignore=tests/gpu")
        found.append(Check("the whole suite, as on the CPU", whole, 300, {}))
    return found


def run(check: Check, deadline: float) -> str:
    """What came of it, in a few words; its output is in a file."""
    seconds = min(check.seconds, deadline - time.monotonic())
    if seconds < AT_LEAST:
        return "not run: no time was left"
    log = OUT / f"{check.name.replace(' ', '-').replace(',', '')}.txt"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **check.variables}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                check.command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_takes_interrupts,
            )
        except OSError as error:
            return f"FAILED: it does not start: {error}"
        finished = _ended(process, seconds)
        if not finished:
            _end(process)
    lines = log.read_text(errors="replace").strip().splitlines()
    tail = (lines or [""])[-1][:100]
    if not finished:
        return f"not finished in {seconds:.0f} s (see {log.name}): {tail}"
    code = process.returncode
    return f"{'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s: {tail}"


def _takes_interrupts() -> None:
    """A shell starts what runs in the background with interrupts ignored, and so would be all that is started from it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(process: subprocess.Popen[Any], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[Any]) -> None:
    """Like Ctrl-C, after which a benchmark writes the rows that it has; and then for good, with the processes that it started."""
    for way, seconds in ((signal.SIGINT, TO_END), (signal.SIGKILL, TO_END)):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            return
        if _ended(process, seconds) and way is signal.SIGKILL:
            return


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark; none if it wrote no file, or not all of it."""
    try:
        return json.loads((OUT / f"{name}.json").read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []


def verdicts() -> list[str]:
    """A line for each target: what was measured, or that it was not."""
    lines = []
    for what, found in (
        ("layers of ResNet-50", _of_layers("resnet50")),
        ("against torch.compile", _of_layers("compile")),
        ("step of ResNet-50", _of_steps()),
        ("from which size on", _of_sizes()),
    ):
        lines += found or [f"| {what} | no row was written | not measured |"]
    return lines


def _of_layers(file: str) -> list[str]:
    from batchnorm.bench.row import Row
    from batchnorm.bench.targets import summarize

    lines = []
    for summary in summarize([Row(**row) for row in rows(file)]):
        if summary.target is None:
            continue
        group, limit = summary.group, summary.ratio_to_limit["ours"]
        faster = ", ".join(f"{ratio:.2f}x of {name}" for name, ratio in summary.faster.items())
        what = f"{group.direction}, {group.layout}, {group.epilogue}, {group.outputs}"
        lines.append(f"| {what} | {limit:.2f} of its bytes, {faster}; worst {summary.worst:.2f} | {summary.verdict} |")
    return lines


def _of_steps() -> list[str]:
    return [
        f"| step of ResNet-50, {row['provider']} | {row['ratio_to_eager']:.2f}x of eager | "
        f"{'held' if row['ratio_to_eager'] >= 1.1 else 'missed'} |"
        for row in rows("model")
        if row["provider"] in ("ours", "fused") and row["ratio_to_eager"] is not None
    ]


def _of_sizes() -> list[str]:
    found = rows("threshold")
    if not found:
        return []
    sys.path.insert(0, str(ROOT / "benchmarks"))
    verdict = importlib.import_module("gpu_threshold").verdict
    return [f"| from which size on | {verdict(found)} | the table says 32 MB |"]


def main() -> int:
    """2 without a GPU; 1 if a check failed."""
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here, so nothing was run")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.iterdir():  # whose rows would be taken for those of this run
        if old.suffix in (".json", ".md", ".txt"):
            old.unlink()
    sys.path.insert(0, str(ROOT / "src"))
    deadline = time.monotonic() + SECONDS
    said = list[str]()
    failed, text = False, ""
    for check in checks():
        print(f"{check.name} ...", flush=True)
        came = run(check, deadline)
        failed |= not came.startswith("passed")
        print(f"    {came}", flush=True)
        said.append(f"| {check.name} | {came} |")
        text = page(said)
        (OUT / "verdict.md").write_text(text)
    print(text)
    return int(failed)


def page(said: list[str]) -> str:
    """The checks so far, and the verdicts that they allow."""
    head = f"# {torch.cuda.get_device_name()}, torch {torch.__version__}"
    try:
        found = verdicts()
    except Exception as error:  # a row of another shape must not cost what the checks have said
        found = [f"| the rows cannot be summarized | {type(error).__name__}: {error} | not measured |"]
    table = ["| check | |", "|---|---|", *said, "", "| target | measured | |", "|---|---|---|", *found]
    return "\n".join([head, "", *table]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
