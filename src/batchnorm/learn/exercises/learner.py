"""What a learner defines in a file or a notebook: called with tensors or arrays, and checked for type and shape."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from batchnorm.language import tr

CLOSE = 1e-6  # relative to the largest number, so that float32 passes and no other formula does
Variants = Mapping[str, Callable[[], Tensor]]


class NotDone(Exception):  # noqa: N818 - it is no error
    """The learner has not done this yet."""


class Wrong(Exception):  # noqa: N818 - it is what the learner reads
    """What the learner misunderstood, or why the check cannot tell, as a sentence."""


class Nothing(Wrong):
    """A function returns None."""


class Learner:
    """The names that a learner defined."""

    def __init__(self, namespace: Mapping[str, Any]) -> None:
        self.namespace = namespace

    def get(self, name: str) -> Any:
        """What the learner defined under this name."""
        if name not in self.namespace:
            raise Wrong(tr("{name} is missing: define it", name=name))
        value = self.namespace[name]
        if value is None or value is ...:
            raise NotDone
        return value

    def numbers(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """A number, or a list of numbers, of this shape, float64."""
        value = self.get(name)
        if isinstance(value, list | tuple) and any(each is ... or each is None for each in value):
            raise NotDone
        return _tensor(name, value, shape)

    def call(self, name: str, arguments: tuple[Any, ...], *shapes: tuple[int, ...]) -> list[Tensor]:
        """What a function returns, float64: one tensor for each shape. It gets arrays where the file has imported NumPy alone."""
        value = self.run(name, *arguments)
        if value is None:
            raise Nothing(tr("{name} returns None: return the result", name=name))
        if len(shapes) == 1:
            return [_tensor(name, value, shapes[0])]
        if not isinstance(value, tuple | list) or len(value) != len(shapes):
            raise Wrong(
                tr("{name} returns {kind}; return {count} tensors", name=name, kind=_kind(value), count=len(shapes))
            )
        return [_tensor(name, each, shape) for each, shape in zip(value, shapes, strict=True)]

    def run(self, name: str, *arguments: Any) -> Any:
        """What a function or a class returns, as it is."""
        function = self.get(name)
        if not callable(function):
            raise Wrong(tr("{name} is {kind}; define a function", name=name, kind=_kind(function)))
        with self.running():
            first, *others = self._kinds()
            try:
                return _applied(name, function, arguments, first)
            except (NotImplementedError, Wrong):
                raise
            except Exception:
                if not others or not any(isinstance(each, Tensor) for each in arguments):
                    raise
                return _applied(name, function, arguments, others[0])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn what the learner's code raises into `Wrong` and `NotDone`."""
        try:
            yield
        except NotImplementedError as error:
            raise NotDone from error
        except (Wrong, NotDone):
            raise
        except Exception as error:
            raise Wrong(self.told(error)) from error

    def told(self, error: BaseException) -> str:
        """An exception of the learner's code in a line, with the line where it was raised."""
        own = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_globals is self.namespace]
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame in own]
        what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        return tr("line {line} raises {error}", line=lines[-1], error=what) if lines else what

    def _kinds(self) -> list[Callable[[Tensor], Any]]:
        """How tensors are given to the learner's functions, the most likely way first."""
        numpy = sys.modules.get("numpy")
        imported = list(self.namespace.values())
        if numpy is None or not any(value is numpy for value in imported):
            return [Tensor.clone]
        arrays: Callable[[Tensor], Any] = lambda tensor: tensor.numpy().copy()  # noqa: E731
        return [Tensor.clone, arrays] if any(value is torch for value in imported) else [arrays]

    def is_template(self, template: Mapping[str, Any], names: Iterable[str]) -> bool:
        """Whether all of these names still have the template's code."""
        return all(name in self.namespace and _code(self.namespace[name]) == _code(template[name]) for name in names)


def _applied(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], kind: Callable[[Tensor], Any]) -> Any:
    """The value of a function that must leave its arguments as they are."""
    given = [kind(each) if isinstance(each, Tensor) else each for each in arguments]
    value = function(*given)
    for before, after in zip(arguments, given, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, torch.as_tensor(after)):
            raise Wrong(
                tr(
                    "{name} changes its argument in place, which its caller still needs: compute a new tensor",
                    name=name,
                )
            )
    return value


def _tensor(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """A value as a float64 tensor of this shape."""
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        found = found.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(tr("{name} is {kind}; it must be numbers", name=name, kind=_kind(value))) from error
    if tuple(found.shape) != shape:
        raise Wrong(
            tr("{name} has shape {found}; it must have shape {shape}", name=name, found=tuple(found.shape), shape=shape)
        )
    return found


def _kind(value: Any) -> str:
    return f"{type(value).__name__}({len(value)})" if isinstance(value, tuple | list) else type(value).__name__


def _code(value: Any) -> Any:
    """What a definition is made of, comparable: the names and constants of a function and of a class's methods.

    Byte code depends on whether a file or a cell of a notebook was compiled.
    """
    if isinstance(value, FunctionType):
        return _code(value.__code__)
    if isinstance(value, CodeType):
        constants = [_code(each) if isinstance(each, CodeType) else each for each in value.co_consts]
        return value.co_names, value.co_varnames, constants
    if isinstance(value, type):
        return {name: _code(each) for name, each in vars(value).items() if isinstance(each, FunctionType)}
    return repr(value)


def agree(found: Tensor, right: Tensor, close: float = CLOSE) -> bool:
    """Whether two tensors are equal, but for rounding."""
    scale = max(1.0, float(right.abs().max()))
    return bool(((found - right).abs() <= close * scale).all())  # NaN agrees with nothing


def judge(name: str, found: Tensor, right: Tensor, variants: Variants, close: float = CLOSE) -> None:
    """Raise `Wrong` unless a result is right: with the misconception whose formula gives it, or with both numbers."""
    if agree(found, right, close):
        return
    for misconception, formula in variants.items():
        try:
            wrong = formula()
        except RuntimeError:  # wrong axes do not fit every shape
            continue
        if agree(found, wrong, close):
            raise Wrong(tr(misconception))
    at = tuple(((found - right).abs().nan_to_num(torch.inf) > close).nonzero()[0].tolist())
    place = "[" + ", ".join(map(str, at)) + "]" if at else ""
    raise Wrong(
        tr(
            "{name} is {found}; it must be {right}",
            name=name + place,
            found=f"{float(found[at]):.6g}",
            right=f"{float(right[at]):.6g}",
        )
    )


def normal(seed: int, *shape: int) -> Tensor:
    """Random numbers, float64, the same for a seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
