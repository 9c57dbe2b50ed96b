"""The environment of a measurement: versions, machine, and which kernel runs for which input, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from batchnorm import kernels
from batchnorm.functional.checks import in_kernel_layout
from batchnorm.kernels import Activation, Epilogue
from batchnorm.version import __version__

TESTED = ("2.11", "2.14")  # the oldest and the newest torch that the tests run on
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADVICE = "THP_MEM_ALLOC_ENABLE"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Machine:
    """The machine: processor, cores, instruction set, operating system."""

    cpu: str
    cores: int
    isa: str
    system: str


@dataclass(frozen=True)
class Choice:
    """The kernel that computes a call.

    Attributes:
        device, dtype, layout: device, dtype and layout of the input.
        epilogue: the operations that are fused with the normalization.
        kernel: the name of the kernel.
        refusals: for each kernel before it in the list, why it does not accept the call.
    """

    device: str
    dtype: str
    layout: str
    epilogue: str
    kernel: str
    refusals: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """Everything that `batchnorm env` prints."""

    versions: dict[str, str]
    machine: Machine
    threads: int
    kernels: dict[str, str]
    huge_pages: str
    torch_huge_pages: bool
    gpus: list[str]
    choices: list[Choice]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The environment as plain data for JSON."""
        return asdict(self)


def environment() -> Environment:
    """Collect the environment, without measuring anything."""
    pages, allowed = huge_pages(), os.environ.get(ADVICE) == "1"
    return Environment(
        versions=versions(),
        machine=machine(),
        threads=torch.get_num_threads(),
        kernels={kernel.name: kernel.status() for kernel in kernels.KERNELS},
        huge_pages=pages,
        torch_huge_pages=allowed,
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        choices=choices(),
        advice=[*torch_advice(torch.__version__), *advice(pages, allowed)],
    )


def versions() -> dict[str, str]:
    """Versions of this library, torch and Python."""
    return {"batchnorm": __version__, "torch": torch.__version__, "python": platform.python_version()}


def cores() -> int:
    """How many cores this process may use; all, if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> Machine:
    """Processor, cores that this process may use, and the instruction set that torch uses here."""
    system = f"{platform.system()} {platform.machine()}"
    return Machine(_cpu(), cores(), torch.backends.cpu.get_cpu_capability(), system)


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, with family and model if known, since names of virtual processors say little."""
    try:
        lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in reversed(list(lines))}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def huge_pages() -> str:
    """The setting of the operating system: "always", "madvise" or "never"; "unknown" if there is none."""
    try:
        return HUGE_PAGES.read_text(encoding="utf-8").partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


def torch_advice(version: str) -> list[str]:
    """Advice if this torch is newer or older than the versions that the tests run on."""
    oldest, newest = TESTED
    found = _release(version)
    if found > _release(newest):
        return [
            f"torch {version} is newer than the newest that this library is tested with, {newest}. Most things will work; if one "
            f'does not, install torch {newest} (pip install "torch=={newest}.*") and report it.'
        ]
    if found < _release(oldest):
        return [
            f'torch {version} is older than this library needs; install {oldest} or newer (pip install "torch>={oldest}").'
        ]
    return []


def _release(version: str) -> tuple[int, ...]:
    """(2, 14) of "2.14.1+cu130" or "2.14.0a0"."""
    return tuple(int(number) for number in version.split(".")[:2])


def advice(pages: str, allowed: bool) -> list[str]:
    """Advice on settings that make this machine faster."""
    if pages == "madvise" and not allowed:
        return [
            f"Set {ADVICE}=1: torch then asks for huge pages, and a new large tensor costs hundreds of page faults instead of "
            "tens of thousands. `batchnorm env --measure` shows the effect here."
        ]
    if pages == "never":
        return [f"Huge pages are off; `echo madvise > {HUGE_PAGES}` as root lets a program ask for them."]
    return []


def choices() -> list[Choice]:
    """Ask every kernel, in the order of `kernels.KERNELS`, about each kind of input."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
    return [
        choice(device, dtype, layout, masked)
        for device in devices
        for dtype in (DTYPES if device != "mps" else DTYPES[:3])
        for layout in ("planar", "channels_last", "strided")
        for masked in (False, True)
    ]


def choice(device: str, dtype: torch.dtype, layout: str, masked: bool) -> Choice:
    """The kernel for an input of about a megabyte, with residual and ReLU."""
    x = torch.empty(8, 64, 28, 56 if layout == "strided" else 28, dtype=dtype, device=device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = in_kernel_layout(x[..., ::2]) if layout == "strided" else x
    mask = torch.ones(8, 1, 28, 28, dtype=torch.bool, device=device) if masked else None
    weight = torch.empty(64, dtype=torch.promote_types(dtype, torch.float32), device=device)
    epilogue = Epilogue(weight, weight, x, mask, Activation("relu"))
    kernel = kernels.select(x, epilogue)
    earlier = kernels.KERNELS[: kernels.KERNELS.index(kernel)]
    refusals = {other.name: str(other.refuses(x, epilogue)) for other in earlier}
    what = "mask, add, relu" if masked else "add, relu"
    return Choice(device, str(dtype).removeprefix("torch."), layout, what, kernel.name, refusals)
