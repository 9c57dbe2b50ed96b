"""Whether a plan's programs may run on a device: what they say of themselves at the first use, and what failed since.

The first time a plan is to compute something on a device, its programs compute a small tensor, into outputs that were filled with NaN,
and the results are compared with those of torch's operators. The fused pairs of a plan have one check, its verbs another, since they are
other launches, and most trainings never need them. A plan whose programs do not compile, do not start, or compute something
else is not asked again on that device: torch's operators compute its calls, a warning says so once, and `batchnorm env` says why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

CHECK = "BATCHNORM_GPU_CHECK"

# For a plan, its verbs or the update of running statistics, on a device: why these programs do not run, or None if nothing is wrong.
_found: dict[tuple[str, str], str | None] = {}


def refusal(name: str, device: torch.device, check: Callable[[], str | None]) -> str | None:
    """Why the programs of this name do not run on the device, or None; at the first use `check` decides."""
    key = (name, str(device))
    if key not in _found:
        if _capturing(device):
            return "its first use is in the capture of a CUDA graph; run the model once before"
        problem = None
        if os.environ.get(CHECK) != "off":
            try:
                problem = check()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler, a driver or a launch raises
                problem = _in_words(error)
        _found[key] = problem
        if problem is not None:
            failed(name, device, problem)
    return _found[key]


def known_good(name: str, device: str) -> bool:
    """Whether the plan ran on the device before."""
    return (name, device) in _found and _found[name, device] is None


def any_known_good(device: torch.device) -> bool:
    """Whether any plan ran on the device before."""
    return any(where == str(device) and problem is None for (_, where), problem in _found.items())


def attempt(name: str, device: torch.device, call: Callable[[], Result]) -> Result | None:
    """What the call returns, or None where it fails; the plan is not asked again then."""
    if _found.get((name, str(device))) is not None:
        return None
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        failed(name, device, _in_words(error))
        return None


def failed(name: str, device: torch.device, problem: str) -> None:
    """Torch's operators compute the calls of this plan from now on."""
    _found[name, str(device)] = problem
    warnings.warn(
        f"on {device} torch's operators compute what the plan \"{name}\" would, with torch's speed and accuracy: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )


def failures() -> list[str]:
    """What failed, in words."""
    return [f'"{name}" on {device}: {problem}' for (name, device), problem in _found.items() if problem is not None]


def forget() -> None:
    """As at the start: every plan is checked again."""
    _found.clear()


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # which may not be the current one
        return torch.cuda.is_current_stream_capturing()


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
