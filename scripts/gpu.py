"""Everything that needs a GPU, in ten minutes: tests, benchmarks, and a verdict for each target, in runs/gpu/. `make gpu` runs it.

It needs torch 2.11 or newer for this GPU, its Triton, this package (pip install -e .[cli]) and pytest with pytest-xdist. Without a GPU it
says so, and exits with 2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "gpu"


class Check(NamedTuple):
    """A command, how many seconds it may take, and what it sets in the environment."""

    name: str
    command: list[str]
    seconds: int
    variables: dict[str, str]


def checks() -> list[Check]:
    """In the order of what is most worth knowing, should time run out."""
    on_device = {"BATCHNORM_TEST_DEVICE": "cuda"}

    def tests(arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments.split()]

    def bench(arguments: str, file: str) -> list[str]:
        command = [sys.executable, "-m", "batchnorm", "bench", "--device", "cuda", "--force", *arguments.split()]
        return [*command, "--json", str(OUT / f"{file}.json")]

    shapes = "--suite resnet50 --batch 256 --dtype bfloat16 --direction forward,backward,step --minutes 1.2"
    steps = "--model resnet50 --layout channels_last --batch 256 --rounds 12 --outputs warm --fuse"
    compiled = "--suite resnet50 --batch 256 --quick --dtype bfloat16 --direction step --outputs flushed --provider compile,ours"
    found = [
        Check("kernels on the device", tests("tests/gpu --ignore=tests/gpu/test_ahead_of_time.py"), 150, on_device),
        Check("every shape of ResNet-50", bench(shapes, "resnet50"), 150, {}),
        Check("training steps of ResNet-50", bench(steps, "model"), 90, {}),
        Check("against torch.compile", bench(f"{compiled} --minutes 0.3", "compile"), 90, {}),
        Check("layers, as on the CPU", tests("-n 8 tests/test_layers.py tests/test_functional.py"), 90, {}),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        few = tests("tests/gpu/test_programs.py -k pairs")
        found.append(Check("compute-sanitizer", [sanitizer, "--error-exitcode", "9", *few], 120, on_device))
    return found


def run(check: Check, deadline: float) -> str:
    """What came of it, in a few words; its output is in a file."""
    seconds = min(check.seconds, deadline - time.monotonic())
    if seconds < 5:
        return "not run: no time was left"
    log = OUT / f"{check.name.replace(' ', '-').replace(',', '')}.txt"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **check.variables}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                check.command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not finished in {seconds:.0f} s (see {log.name})"
    tail = (log.read_text().strip().splitlines() or [""])[-1]
    return f"{'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s: {tail[:100]}"


def rows(name: str) -> list[dict[str, Any]]:
    path = OUT / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def verdicts() -> list[str]:
    """A line for each target: what was measured, or that it was not."""
    from batchnorm.bench.row import Row
    from batchnorm.bench.targets import summarize

    lines = []
    for file in ("resnet50", "compile"):
        for summary in summarize([Row(**row) for row in rows(file)]):
            if summary.target is None:
                continue
            group, faster = (
                summary.group,
                ", ".join(f"{ratio:.2f}x of {name}" for name, ratio in summary.faster.items()),
            )
            what = f"{group.direction}, {group.layout}, {group.epilogue}, {group.outputs}"
            limit = summary.ratio_to_limit["ours"]
            lines.append(
                f"| {what} | {limit:.2f} of its bytes, {faster}; worst {summary.worst:.2f} | {summary.verdict} |"
            )
    for row in rows("model"):
        if row["provider"] in ("ours", "fused"):
            ratio = row["ratio_to_eager"]
            lines.append(
                f"| step of ResNet-50, {row['provider']} | {ratio:.2f}x of eager | {'held' if ratio >= 1.1 else 'missed'} |"
            )
    return lines or ["| no row was written | not measured | |"]


def main() -> int:
    """2 without a GPU; 1 if a check failed."""
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here, so nothing was run")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 570
    name = torch.cuda.get_device_name()
    lines = [f"# {name}, torch {torch.__version__}", "", "| check | |", "|---|---|"]
    failed = False
    for check in checks():
        print(f"{check.name} ...", flush=True)
        said = run(check, deadline)
        failed |= not said.startswith("passed")
        print(f"    {said}", flush=True)
        lines.append(f"| {check.name} | {said} |")
    lines += ["", "| target | measured | |", "|---|---|---|", *verdicts()]
    (OUT / "verdict.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
