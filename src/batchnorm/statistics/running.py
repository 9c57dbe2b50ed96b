"""Frozen statistics."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from batchnorm.functional.after_linear import normalize_linear
from batchnorm.logs import logger
from batchnorm.statistics.common import by_running_statistics
from batchnorm.statistics.contract import (
    Applying,
    Layer,
    SourceBuffer,
    SourceParameter,
    Statistics,
    buffers_of,
    parameters_of,
)

_warned = weakref.WeakSet[Layer]()  # layers that save their input although they were asked not to


@dataclass(frozen=True)
class Running:
    """Running statistics in training too: a frozen layer. Its affine parameters still learn; its buffers never change.

    The output of a sample depends on no other sample, so per-sample gradients (differential privacy, `torch.func.vmap` over `grad`)
    are well defined.

    If weight is frozen too, the layer saves no input for the backward. If it learns, its gradient needs the input.

    Attributes:
        save_memory: compute the gradient of weight from that of the convolution or linear layer before, and save no input for it.
        before: the source that `freeze` replaced and `unfreeze` restores; None is `Batch()`.
        learned: names of the parameters that `freeze` froze and `unfreeze` makes trainable again.
        name: of the layer, in warnings.
    """

    frozen: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True
    save_memory: bool = field(default=False, kw_only=True)
    before: Statistics | None = field(default=None, repr=False)
    learned: tuple[str, ...] = field(default=(), repr=False)
    name: str = field(default="", repr=False, compare=False, kw_only=True)

    def __repr__(self) -> str:
        return f"Running({'save_memory=True' if self.save_memory else ''})"

    def __call__(
        self,
        layer: Layer,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None = None,  # noqa: ARG002 (they count in statistics of the batch alone)
    ) -> Tensor:
        chosen = self.in_domain(layer)
        if self.save_memory and chosen.running_mean is not None and chosen.running_var is not None:
            y = normalize_linear(
                x,
                (chosen.running_mean, chosen.running_var),
                (chosen.gamma, chosen.beta),
                chosen.eps,
                activation=chosen.activation,
                residual=residual,
                mask=mask,
            )
            if isinstance(y, Tensor):
                return y
            if y is not None:
                self._warn_once(layer, y)
        return by_running_statistics(chosen, x, residual, mask)

    def _warn_once(self, layer: Layer, reason: str) -> None:
        owner = layer.owner if isinstance(layer, Applying) else layer
        if owner not in _warned:
            _warned.add(owner)
            name = self.name or f"a {type(owner).__name__}"
            logger.warning("freeze: %s saves its input for the gradient of weight: %s", name, reason)

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

    def layer_parameters(self) -> dict[str, SourceParameter]:
        """The parameters of the source that it replaces, likewise."""
        return {} if self.before is None else parameters_of(self.before)
