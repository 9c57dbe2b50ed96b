"""Hand-written batch norms, as in tutorials: surgery does not change them, and says what they are and how to take them over."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from batchnorm.interop.tutorial import hand_written_names, is_hand_written
from batchnorm.surgery.walker import Slot


def hand_written(slots: Iterable[Slot]) -> dict[str, nn.Module]:
    """Each hand-written batch norm of a model's slots once, by the first of its names; "the model" if it is the model itself."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for slot in slots:
        if is_hand_written(slot.module):
            found.setdefault(id(slot.module), (slot.path or "the model", slot.module))
    return dict(found.values())


def why_left_by_hand(layer: nn.Module) -> str:
    """What a hand-written batch norm is, what is wrong with it, and how it becomes ours."""
    names = hand_written_names(layer)
    buffers = dict(layer.named_buffers(recurse=False))
    faults = (
        "" if names[-1] in buffers else "its statistics are no buffers, so state_dict() and .to() do not know them; "
    )
    missing = "".join(f", {name}=..." for name in ("eps", "momentum") if not hasattr(layer, name))
    return (
        f"it is a batch norm written by hand ({type(layer).__name__} with {', '.join(names)}); {faults}replace it with "
        f"batchnorm.interop.from_tutorial(layer{missing}), if momentum weighs the new value and the running variance is biased"
    )
