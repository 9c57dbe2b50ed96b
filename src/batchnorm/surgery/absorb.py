"""Moves activations into the batch norms before them, and fills their places with `Absorbed`."""

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
from batchnorm.torch_state import constant_while_compiling


class Absorbed(nn.Module):
    """Takes the place of an activation that the batch norm before it now applies; returns its input.

    The names of a Sequential's children and the keys of its state_dict stay the same. It holds the original activation for `revert`.
    If the batch norm was replaced, for example by torch's `convert_sync_batchnorm`, nothing would apply the activation, so its forward
    raises a StateError.
    """

    def __init__(self, original: nn.Module, layer: Slot) -> None:
        super().__init__()
        # In tuples, so that they are not children, which hooks, apply and repr would visit.
        self._original, self._layer = (original,), layer

    @property
    def original(self) -> nn.Module:
        """The activation that was in this place."""
        return self._original[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, to which the layer before has already applied the activation.

        Raises:
            StateError: if that layer is no longer there.
        """
        if not self._follows_layer():
            there = type(self._there()).__name__
            raise StateError(
                f"the batch norm that applies {self.original} must be in the place before it, but a {there} is there now; call "
                "batchnorm.revert before you replace layers, and batchnorm.fuse afterwards"
            )
        return input

    @constant_while_compiling  # code for another layer is compiled anew
    def _follows_layer(self) -> bool:
        there, layer = self._there(), self._layer.module
        return there is layer or (there is not None and any(module is layer for module in there.modules()))

    def _there(self) -> nn.Module | None:
        """What is in the layer's place now."""
        return self._layer.module if self._layer.parent is None else self._layer.parent._modules.get(self._layer.name)

    def extra_repr(self) -> str:
        return repr(self.original)


def absorb_activations(slots: list[Slot], report: Report) -> None:
    """Let batch norms apply the activation that follows them in a plain Sequential, or that they call themselves."""
    places = collections.Counter(id(slot.module) for slot in slots)
    for before, after in (*_called(slots), *sequential_pairs(slots)):
        layer, activation = before.module, from_module(after.module)
        if not isinstance(layer, BatchNorm) or layer.activation is not None:
            continue
        if activation is None or does_more(layer) != (after.parent is layer):
            continue
        if places[id(layer)] > 1 or is_watched(layer) or is_watched(after.module):
            reason = "the layer is in several places" if places[id(layer)] > 1 else "one has hooks or its own forward"
            report.leave(f"{before.path or 'the model'} and {after.path} separate", reason)
            continue
        layer.activation = activation
        after.replace(Absorbed(after.module, before).train(after.module.training))
        report.changed.append(before.path or "the model")
        logger.info("fuse: %s now applies %s", before.path or "the model", activation)


def release_activations(slots: list[Slot]) -> None:
    """Put the activations that `absorb_activations` moved back into their places."""
    for layer, activation in (*_called(slots), *sequential_pairs(slots)):
        if isinstance(layer.module, BatchNorm) and isinstance(activation.module, Absorbed):
            original = activation.module.original.train(activation.module.training)
            activation.replace(original)
            layer.module.activation = None


def _called(slots: list[Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Layers that call exactly one submodule after they normalize, identities not counted; with this submodule."""
    for slot in slots:
        if isinstance(slot.module, WithRest):
            called = [(name, getattr(slot.module, name)) for name in slot.module.rest]
            more = [(name, child) for name, child in called if type(child) is not nn.Identity or is_watched(child)]
            if len(more) == 1:
                name, child = more[0]
                yield slot, Slot(f"{slot.path}.{name}".lstrip("."), slot.module, name, child)
