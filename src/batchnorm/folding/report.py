"""What folding did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Folded:
    """A batch norm that is folded.

    Attributes:
        batch_norm: its name in the model.
        into: the names of the layers that took it in.
        kind: "after" where they stood before it, "before" where they come after it, "before, padded" where that took a padding of its
            own, "parallel" where it was a branch beside convolutions.
    """

    batch_norm: str
    into: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Merged:
    """Parallel branches that became one convolution.

    Attributes:
        convolution: the name of what computes them all now.
        branches: what did before; "the input" is one that added its input.
    """

    convolution: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did; `str()` is a table.

    Attributes:
        folded: each batch norm that is gone, and where to.
        merged: parallel branches that became one convolution.
        left: each batch norm that stays, and why.
        untraced: modules whose own forward could not be traced, and why; in them only what is below was looked at.
        max_error: the largest difference to the unfolded model's output for the example.
        largest_output: the largest absolute value of that output.
        tolerance: the largest difference allowed, beside outputs of at most 1; beside larger ones in proportion.
        seconds_before, seconds_after: medians for the example, measured in turns.
        parameters_before, parameters_after: numbers in parameters and in buffers with a fraction.
        batch_norms_before, batch_norms_after: layers.
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
        """Plain data, as JSON takes it."""
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
