"""Activations that a batch norm takes in, and what keeps their place."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from torch import Tensor, nn

from batchnorm.errors import StateError
from batchnorm.kernels import from_module
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.surgery.report import Report
from batchnorm.surgery.subclasses import WithRest, does_more
from batchnorm.surgery.walker import Slot, is_watched, sequential_pairs


class Absorbed(nn.Module):
    """Stands where an activation stood that the batch norm before it now applies; returns its input.

    It keeps the place, so that the names of a Sequential's children and the keys of its state_dict stay, and the original, for
    `revert`. Should the batch norm be exchanged (by torch's `convert_sync_batchnorm`, say), the activation would be lost: then it
    raises a StateError.
    """

    def __init__(self, original: nn.Module, layer: Slot) -> None:
        super().__init__()
        # In tuples, so that they are no children: those would be visited by hooks, apply and repr.
        self._original, self._layer = (original,), layer

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._original[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which the layer before has activated already.

        Raises:
            StateError: if that layer is no longer there.
        """
        _, parent, name, layer = self._layer
        there = layer if parent is None else parent._modules.get(name)
        if there is not layer and (there is None or all(module is not layer for module in there.modules())):
            raise StateError(
                f"the batch norm that applies {self.original} must stand before it, but there is a {type(there).__name__} "
                "now; call batchnorm.revert before layers are exchanged, and batchnorm.fuse afterwards"
            )
        return input

    def extra_repr(self) -> str:
        return repr(self.original)


def absorb_activations(slots: list[Slot], report: Report) -> None:
    """Let batch norms take in the activation that follows them in a plain Sequential, or that they call themselves."""
    places = collections.Counter(id(slot.module) for slot in slots)
    for before, after in (*_called(slots), *sequential_pairs(slots)):
        layer, activation = before.module, from_module(after.module)
        if not isinstance(layer, BatchNorm) or layer.activation is not None:
            continue
        if activation is None or does_more(layer) != (after.parent is layer):
            continue
        if places[id(layer)] > 1 or is_watched(layer) or is_watched(after.module):
            reason = (
                "the layer hangs in several places" if places[id(layer)] > 1 else "one has hooks or its own forward"
            )
            report.leave(f"{before.path or 'the model'} and {after.path} apart", reason)
            continue
        layer.activation = activation
        after.hang(Absorbed(after.module, before).train(after.module.training))
        report.changed.append(before.path or "the model")
        logger.info("fuse: %s now applies %s", before.path or "the model", activation)


def release_activations(slots: list[Slot]) -> None:
    """Put back the activations that batch norms took in."""
    for layer, activation in (*_called(slots), *sequential_pairs(slots)):
        if isinstance(layer.module, BatchNorm) and isinstance(activation.module, Absorbed):
            original = activation.module.original.train(activation.module.training)
            activation.hang(original)
            layer.module.activation = None


def _called(slots: list[Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Layers with the one submodule that they call after they have normalized, identities aside."""
    for slot in slots:
        if isinstance(slot.module, WithRest):
            called = [(name, getattr(slot.module, name)) for name in slot.module.rest]
            more = [(name, child) for name, child in called if type(child) is not nn.Identity or is_watched(child)]
            if len(more) == 1:
                name, child = more[0]
                yield slot, Slot(f"{slot.path}.{name}".lstrip("."), slot.module, name, child)
