"""The report of `fold`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Folded:
    """A folded batch norm.

    Attributes:
        batch_norm: its name in the model.
        into: the names of the layers that it was folded into.
        kind: where it was: "after" or "before" these layers; "before, padded" if this needed a separate padding; "parallel" as a branch
            beside convolutions; "in training" after a layer that it is now a `FoldedPair` with.
    """

    batch_norm: str
    into: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Merged:
    """Parallel branches that became one convolution.

    Attributes:
        convolution: the name of the convolution that computes all of them now.
        branches: the names of the branches; "the input" is a branch that adds its input.
    """

    convolution: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did; `str()` gives a table.

    Attributes:
        folded: each folded batch norm, and the layers it was folded into.
        merged: parallel branches that became one convolution.
        left: each remaining batch norm, and why it was not folded.
        untraced: modules whose forward could not be traced, and why; batch norms in their submodules may be folded.
        max_error: the largest difference to the original model's output for the example.
        largest_output: the largest absolute value of that output.
        tolerance: the largest accepted difference for outputs of at most 1; for larger outputs, multiplied by the largest one.
        seconds_before, seconds_after: median seconds per call with the example, measured alternately.
        parameters_before, parameters_after: number of values in parameters and in floating-point buffers.
        batch_norms_before, batch_norms_after: number of batch norms.
    """

    folded: tuple[Folded, ...]
    merged: tuple[Merged, ...]
    left: dict[str, str]
    untraced: dict[str, str]
    max_error: float
    largest_output: float
    tolerance: float
    seconds_before: float
    seconds_after: float
    parameters_before: int
    parameters_after: int
    batch_norms_before: int
    batch_norms_after: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(pair.batch_norm, f"{pair.kind}: {', '.join(pair.into)}") for pair in self.folded]
        rows += [(" + ".join(merge.branches), f"one convolution: {merge.convolution}") for merge in self.merged]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        rows += [(name, f"not traced: {reason}") for name, reason in self.untraced.items()]
        rows += [
            ("batch norms", f"{self.batch_norms_before} -> {self.batch_norms_after}"),
            ("parameters", f"{self.parameters_before} -> {self.parameters_after}"),
            ("time", f"{1e3 * self.seconds_before:.3g} ms -> {1e3 * self.seconds_after:.3g} ms"),
            ("error", f"{self.max_error:.2g} beside outputs up to {self.largest_output:.2g}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in rows)
