"""Saves memory in training: outputs are computed again in the backward instead of saved for it. `contexts` explains how."""

from batchnorm.memory.contexts import (
    attach,
    close_for_model,
    detach,
    open_for_model,
    recorded,
    recording,
    save_memory,
    saving,
    skipping,
    skips,
    thread,
)

__all__ = [
    "attach",
    "close_for_model",
    "detach",
    "open_for_model",
    "recorded",
    "recording",
    "save_memory",
    "saving",
    "skipping",
    "skips",
    "thread",
]
