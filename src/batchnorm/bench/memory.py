"""Memory: where outputs come from."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from batchnorm.errors import InputError

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own adjustment ends


@contextmanager
def outputs(kind: str) -> Iterator[None]:
    """Let allocations be "reused", from memory that was written before, or "fresh", from where glibc gets them by default.

    Above 32 MB glibc maps untouched pages for each allocation and gives them back after it, and the first write to each page is
    a fault: for a copy that costs several times the copying. Kept in the heap, freed memory is handed out again.

    Raises:
        InputError: "reused" was asked for without glibc.
    """
    if kind == "fresh":
        yield
        return
    if platform.libc_ver()[0] != "glibc":
        raise InputError("outputs can be reused only where glibc allocates; use --outputs fresh")
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # glibc adjusts nothing by itself after the first mallopt: give it what its adjustment ends at
        libc.mallopt(MMAP_MAX, 65536)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
