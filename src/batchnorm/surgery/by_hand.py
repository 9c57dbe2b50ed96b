"""Hand-written batch norms, as in tutorials: surgery does not change them, and says how to convert them."""

from __future__ import annotations

from torch import nn

from batchnorm.interop.tutorial import is_hand_written
from batchnorm.logs import logger
from batchnorm.surgery.walker import Slot, walk

WHY_LEFT = (
    "it is a batch norm written by hand, with gamma and beta, whose running variance may be biased or unbiased; replace it "
    "with batchnorm.interop.from_tutorial(layer)"
)


def hand_written(model: nn.Module) -> dict[str, nn.Module]:
    """Each hand-written batch norm of a model once, by the first of its names; "the model" if it is the model itself."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for slot in walk(model):
        if is_hand_written(slot.module):
            found.setdefault(id(slot.module), (slot.path or "the model", slot.module))
    return dict(found.values())


def warn_of_hand_written(operation: str, slots: list[Slot]) -> None:
    """Warn about each hand-written batch norm, which the operation does not change."""
    for name in hand_written(slots[0].module):
        logger.warning("%s: left %s: %s", operation, name, WHY_LEFT)
