"""Frozen statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from batchnorm.statistics.contract import Kept, Layer, Statistics, kept_by
from batchnorm.statistics.domains import Domains
from batchnorm.statistics.shared import by_running_statistics


@dataclass(frozen=True)
class Running:
    """The running statistics, in training too: a frozen layer. Its affine parameters still learn, its buffers never move.

    No sample sees another, so gradients of single samples (differential privacy, `torch.func.vmap` over `grad`) are well defined.

    Attributes:
        before: the part that `freeze` replaced and `unfreeze` puts back; None is `Batch()`.
        learned: names of the parameters that `freeze` stopped, and `unfreeze` lets learn again.
    """

    before: Statistics | None = field(default=None, repr=False)
    learned: tuple[str, ...] = field(default=(), repr=False)

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if isinstance(self.before, Domains):
            layer = self.before.seen_by(layer)
        return by_running_statistics(layer, x, residual, mask)

    def kept(self) -> dict[str, Kept]:
        """Those of the part it stands for, which `unfreeze` needs again."""
        return {} if self.before is None else kept_by(self.before)
