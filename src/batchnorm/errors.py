"""Exceptions of this library. Each also derives from the type torch raises in its place, so existing `except` clauses keep working.

BatchNormError
 ├─ InputError         (ValueError)    a tensor or a number that batch normalization cannot work with
 │   └─ ShapeError     (RuntimeError)  sizes that do not fit together
 ├─ DTypeError         (TypeError, NotImplementedError)  a tensor whose dtype has no normalization
 ├─ ArgumentError      (TypeError)     an argument of the wrong kind
 ├─ StateError         (RuntimeError)  buffers, parameters or a transform in a state that does not allow the call
 ├─ FoldingError       (RuntimeError)  a folded model that puts out something else
 ├─ ReplicaError       (RuntimeError)  replicas that did not answer, or that were not at the same layer
 └─ MissingExtraError  (ImportError)   an optional dependency is not installed

A message states the invariant, what came, and the remedy.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Root of every exception this library raises on purpose."""


class InputError(BatchNormError, ValueError):
    """A tensor or a number that batch normalization cannot work with."""


class ShapeError(InputError, RuntimeError):
    """Sizes that do not fit together: a parameter, a buffer, a residual or a mask beside its input."""


class DTypeError(BatchNormError, TypeError, NotImplementedError):
    """A tensor whose dtype has no normalization, such as an integer."""


class ArgumentError(BatchNormError, TypeError):
    """An argument of the wrong kind."""


class StateError(BatchNormError, RuntimeError):
    """Buffers, parameters or a transform are in a state that does not allow the call."""


class FoldingError(BatchNormError, RuntimeError):
    """A folded model puts out something else than the model it was made of."""


class ReplicaError(BatchNormError, RuntimeError):
    """Replicas of a process group did not answer, or were not at the same layer."""


class MissingExtraError(BatchNormError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
