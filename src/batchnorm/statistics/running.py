"""Frozen statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from batchnorm.statistics.common import by_running_statistics
from batchnorm.statistics.contract import Layer, SourceBuffer, Statistics, buffers_of


@dataclass(frozen=True)
class Running:
    """Running statistics in training too: a frozen layer. Its affine parameters still learn; its buffers never change.

    The output of a sample depends on no other sample, so per-sample gradients (differential privacy, `torch.func.vmap` over `grad`)
    are well defined.

    Attributes:
        before: the source that `freeze` replaced and `unfreeze` restores; None is `Batch()`.
        learned: names of the parameters that `freeze` froze and `unfreeze` makes trainable again.
    """

    frozen: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True
    before: Statistics | None = field(default=None, repr=False)
    learned: tuple[str, ...] = field(default=(), repr=False)

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None = None,  # noqa: ARG002 (they count in statistics of the batch alone)
    ) -> Tensor:
        return by_running_statistics(self.in_domain(layer), x, residual, mask)

    @property
    def infers_by_running_statistics(self) -> bool:
        """As the source that it replaces, since domains stay apart."""
        return self.before is None or getattr(self.before, "infers_by_running_statistics", False)

    def in_domain(self, layer: Layer) -> Layer:
        """The layer as the source that this one replaces uses it."""
        choose = getattr(self.before, "in_domain", None)
        return layer if choose is None else choose(layer)

    def layer_buffers(self) -> dict[str, SourceBuffer]:
        """The buffers of the source that it replaces; `unfreeze` needs them again."""
        return {} if self.before is None else buffers_of(self.before)
