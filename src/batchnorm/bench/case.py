"""Cases: one batch norm in one layout, dtype and direction, and the bytes that it must read and write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchnorm.bench.suite import Layer, Suite
from batchnorm.errors import InputError

LAYOUTS = ("planar", "channels_last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DIRECTIONS = ("forward", "recorded", "backward", "step", "inference")
OUTPUTS = ("reused", "fresh")
CACHES = ("flushed", "warm")  # in their place on a GPU: the L2 cache before each call
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """A batch norm to time.

    Attributes:
        suite: the network that contains it.
        layer: shape and epilogue.
        through: "function", "layer" or "replicas".
        layout: "planar" or "channels_last". A 2-D input is always the latter.
        dtype: dtype of the input; parameters and buffers have at least float32.
        direction: "forward" in training without autograd; "recorded", the same with autograd; "backward" alone;
            "step", forward and backward; "inference" with running statistics.
        outputs: "reused", memory that was written before; "fresh", as glibc allocates by default; on a GPU "flushed" or "warm", which is
            its L2 cache.
        threads: number of torch's threads.
        device: "cpu" or "cuda".
    """

    suite: str
    layer: Layer
    through: str
    layout: str
    dtype: str
    direction: str
    outputs: str
    threads: int
    device: str = "cpu"

    @property
    def tensor_bytes(self) -> int:
        """Size of the input, and of every other tensor with its shape."""
        return math.prod(self.layer.shape) * DTYPES[self.dtype].itemsize

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.layer.shape))

    @property
    def epilogue(self) -> str:
        """The fused operations, such as BN+add+relu."""
        return "+".join(["BN", *["add"] * self.layer.residual, *filter(None, [self.layer.activation])])

    @property
    def needs_grad(self) -> bool:
        return self.direction in ("recorded", "backward", "step")

    @property
    def passes(self) -> int:
        """How many times a tensor of the input's size must be read or written.

        forward     reads x and the residual, writes y. In channels_last, a channel's values are spread over the whole tensor,
                    so x is read once for the statistics and once more
        backward    reads x and dy, writes dx; in channels_last, x and dy are read twice. With a residual, it writes dresidual; if
                    there is an activation too, its derivative needs the residual, which is read whenever x is
        inference   as a planar forward
        """
        again = self.layout == "channels_last" and self.direction != "inference"
        forward, backward = again, again * (2 + self._derivative_reads_residual)
        repeated = {"backward": backward, "step": forward + backward + 1 + self._derivative_reads_residual}
        return self.tensors + repeated.get(self.direction, forward)

    @property
    def tensors(self) -> int:
        """How many tensors of the input's size are read or written, each counted once."""
        residual = self.layer.residual
        backward = 3 + residual + self._derivative_reads_residual
        return {"backward": backward, "step": 4 + 2 * residual}.get(self.direction, 2 + residual)

    @property
    def _derivative_reads_residual(self) -> bool:
        return self.layer.residual and self.layer.activation is not None


def cases(
    suites: Sequence[Suite],
    layouts: Sequence[str],
    dtypes: Sequence[str] | None,
    directions: Sequence[str] | None,
    outputs: Sequence[str],
    threads: Sequence[int],
    device: str = "cpu",
) -> list[Case]:
    """Every combination, with cases of the same tensors next to each other. `dtypes` and `directions` None are each suite's default.

    Raises:
        InputError: on an unknown value or a number below 1.
    """
    choices = {
        "layout": (layouts, LAYOUTS),
        "dtype": (dtypes or (), DTYPES),
        "outputs": (outputs, OUTPUTS if device == "cpu" else CACHES),
    }
    choices["direction"] = (directions or (), DIRECTIONS)
    for what, (given, known) in choices.items():
        for word in given:
            if word not in known:
                raise InputError(f"{what} must be one of {', '.join(known)}, but got {word!r}")
    if any(number < 1 for number in threads):
        raise InputError(f"threads must be at least 1, but got {min(threads)}")
    return [
        Case(suite.name, layer, suite.through, layout, dtype, direction, output, number, device)
        for suite in suites
        for layer in suite.layers
        for layout in (layouts if len(layer.shape) > 2 else ["channels_last"])
        for dtype, direction, output, number in itertools.product(
            dtypes or suite.dtypes or ("float32",), directions or usual(suite), outputs, threads
        )
    ]


def usual(suite: Suite) -> tuple[str, ...]:
    """The default directions of a suite: for layers, those that show the overhead around kernels; for functions, the kernels."""
    if suite.directions:
        return suite.directions
    through = {"layer": ("forward", "recorded", "step"), "replicas": ("forward", "step")}
    return through.get(suite.through, ("forward", "backward", "inference"))


def quick(suite: Suite) -> Suite:
    """A copy of the suite with four of its layers, from the largest to the smallest."""
    ordered = sorted(suite.layers, key=lambda layer: -math.prod(layer.shape))
    chosen = {round(index * (len(ordered) - 1) / 3) for index in range(4)}
    return replace(suite, layers=tuple(ordered[index] for index in sorted(chosen)))


def with_batch(suite: Suite, batch: int) -> Suite:
    """A copy of the suite with so many samples in each layer's input."""
    return replace(suite, layers=tuple(replace(one, shape=(batch, *one.shape[1:])) for one in suite.layers))


@dataclass(frozen=True)
class Tensors:
    """The inputs of every provider of a case; shapes (N, C, *S) and (C,)."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor


def tensors(case: Case, seed: int = 0) -> Tensors:
    """Random tensors; the input has mean 0.5 and standard deviation 2, as after a convolution, not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype, C = DTYPES[case.dtype], case.layer.shape[1]
    narrow = torch.promote_types(dtype, torch.float32)

    def activations(mean: float, deviation: float) -> Tensor:
        values = torch.empty(case.layer.shape).normal_(mean, deviation, generator=generator).to(dtype)
        return laid_out(values, case.layout).to(case.device)

    def channels(low: float, high: float) -> Tensor:
        return torch.empty(C, dtype=narrow).uniform_(low, high, generator=generator).to(case.device)

    return Tensors(
        x=activations(0.5, 2.0),
        dy=activations(0.0, 1.0),
        residual=activations(0.0, 1.0) if case.layer.residual else None,
        weight=channels(0.5, 1.5),
        bias=channels(-0.5, 0.5),
        mean=channels(0.0, 1.0),
        variance=channels(3.0, 5.0),
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, in planar layout or with the channels innermost."""
    if layout == "planar":
        return values.contiguous()
    return values.movedim(1, -1).contiguous().movedim(-1, 1)  # for any rank; torch's channels_last needs 4 or 5 axes
