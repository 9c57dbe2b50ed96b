"""Exceptions of this library. Each also derives from the type that torch raises in the same case, so existing `except` clauses work.

BatchNormError
 ├─ InputError         (ValueError)    a tensor or a number that batch normalization cannot use
 │   └─ ShapeError     (RuntimeError)  sizes that do not fit together
 ├─ DTypeError         (TypeError, NotImplementedError)  a tensor with a dtype that cannot be normalized
 ├─ ArgumentError      (TypeError)     an argument of the wrong kind
 ├─ StateError         (RuntimeError)  buffers, parameters or a transform in a state that does not allow the call
 ├─ FoldingError       (RuntimeError)  the outputs of a folded model differ
 ├─ ReplicaError       (RuntimeError)  replicas that did not answer, or that were in different layers
 └─ MissingExtraError  (ImportError)   an optional dependency is not installed

A message states the invariant, the actual value, and the remedy.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Base class of all exceptions that this library raises on purpose."""


class InputError(BatchNormError, ValueError):
    """A tensor or a number that batch normalization cannot use."""


class ShapeError(InputError, RuntimeError):
    """A parameter, a buffer, a residual or a mask whose size does not match the input."""


class DTypeError(BatchNormError, TypeError, NotImplementedError):
    """A tensor with a dtype that cannot be normalized, such as an integer."""


class ArgumentError(BatchNormError, TypeError):
    """An argument of the wrong kind."""


class StateError(BatchNormError, RuntimeError):
    """The state of buffers, parameters or a transform does not allow the call."""


class FoldingError(BatchNormError, RuntimeError):
    """The outputs of a folded model differ from those of the original model."""


class ReplicaError(BatchNormError, RuntimeError):
    """Replicas of a process group did not answer, or were in different layers."""


class MissingExtraError(BatchNormError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
