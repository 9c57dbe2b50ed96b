"""Controls whether outputs are allocated in reused or in fresh memory, and asks whether a case fits."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchnorm.bench.case import Case
from batchnorm.errors import InputError

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGEST_THRESHOLD = 32 * 2**20  # the upper limit of glibc's automatic adjustment


# Tensors of the input's size that exist at once at most: input, gradient, their layout in the making, a copy's two, outputs of two
# implementations, and the exact result of a few channels.
TENSORS = 9


def missing_for(case: Case) -> str | None:
    """Why a case does not fit into the memory that is free now; None if it does, or if the system does not say."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    needed = TENSORS * case.tensor_bytes
    return None if needed <= free else f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


@contextmanager
def outputs(kind: str) -> Iterator[None]:
    """Make allocations "reused", in memory that was written before, or "fresh", as glibc allocates by default.

    Above 32 MB, glibc maps new pages for each allocation and unmaps them afterwards, and the first write to each page is a page fault,
    which costs several times as much as copying the page. With "reused", freed memory stays in the heap and is allocated again.

    Below 32 MB, glibc does likewise until a process has freed a tensor of that size, as most trainings do in their first step. So one is
    freed here: else two providers differ threefold because of what was allocated before them.

    Raises:
        InputError: "reused" without glibc.
    """
    if kind == "fresh":
        torch.empty(LARGEST_THRESHOLD - 2**16, dtype=torch.uint8)
        yield
        return
    if platform.libc_ver()[0] != "glibc":
        raise InputError("outputs can be reused only with glibc; use --outputs fresh")
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # after the first mallopt glibc adjusts nothing by itself, so set the values that its adjustment ends at
        libc.mallopt(MMAP_MAX, 65536)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
