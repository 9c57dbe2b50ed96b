"""Triton's interpreter as the tests need it: rounding to bfloat16 as on a GPU, reads that are counted, programs in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime import interpreter

from batchnorm.kernels.gpu import operators
from batchnorm.kernels.gpu.programs import forward

_convert = interpreter._convert_float


def _convert_float(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
    """The interpreter truncates to bfloat16, and may make an Inf of a NaN; a GPU rounds to nearest even."""
    if str(input_dtype) == "fp32" and str(output_dtype) == "bf16":
        return torch.from_numpy(np.ascontiguousarray(input)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return _convert(input, input_dtype, output_dtype, rounding_mode)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor: Any, scope: Any) -> None:
    """Numpy from 2.4 makes no number of an array of one value, which the interpreter of Triton 3.6 asks for in each `range`."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def repair() -> None:
    """Make the interpreter compute what a GPU does."""
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor = _patch_index
    try:
        wrap_triton(forward.apply)
    except RuntimeError:  # of torch 2.11, which takes no program of the interpreter; later releases return it as it is
        operators.wrap_triton = lambda program: program


@contextlib.contextmanager
def counted_reads(**tensors: Tensor) -> Iterator[dict[str, int]]:
    """How many values are read from each tensor."""
    places = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()}
    counts = dict.fromkeys(tensors, 0)
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if mask.data.any():
            first = int(pointers.data[mask.data].min())
            for name, (low, high) in places.items():
                if low <= first < high:
                    counts[name] += int(mask.data.sum())
        return load(self, pointers, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = counting
    try:
        yield counts
    finally:
        interpreter.InterpreterBuilder.create_masked_load = load


@contextlib.contextmanager
def programs_in_order(order: Any) -> Iterator[None]:
    """Run the programs of each launch in another order: `order` takes and returns the list of their numbers."""
    builder = interpreter.interpreter_builder
    set_index, set_dim = builder.set_grid_idx, builder.set_grid_dim
    state = SimpleNamespace(numbers=[])

    def dim(x: int, y: int, z: int) -> None:
        state.numbers = order(list(range(x)))
        set_dim(x, y, z)

    builder.set_grid_dim, builder.set_grid_idx = dim, lambda x, y, z: set_index(state.numbers[x], y, z)
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


@contextlib.contextmanager
def counted_programs() -> Iterator[list[int]]:
    """How many programs each launch has."""
    builder, counts = interpreter.interpreter_builder, list[int]()
    set_dim = builder.set_grid_dim

    def dim(x: int, y: int, z: int) -> None:
        counts.append(x * y * z)
        set_dim(x, y, z)

    builder.set_grid_dim = dim
    try:
        yield counts
    finally:
        del builder.set_grid_dim
