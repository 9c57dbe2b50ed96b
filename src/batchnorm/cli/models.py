"""A user's model and data on the command line: `package.module:factory`; weights read without running code from the file."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, InputError, MissingExtraError
from batchnorm.files import whole

SAFETENSORS = ".safetensors"


def find(spec: str) -> Any:
    """What `package.module:name` names; the current folder is searched first, as `python -m` does.

    Raises:
        InputError: if there is no such module or name, or the module itself fails.
    """
    path, _, name = spec.partition(":")
    if not path or not name:
        raise InputError(f"{spec!r} must name an object as package.module:name, such as mynet.models:resnet")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a script without a guard may call sys.exit
        raise InputError(
            f"{spec} must be importable from {os.getcwd()}, but {type(error).__name__}: {error}; check the name, or start "
            "where the package can be found"
        ) from error
    return found


def build(spec: str) -> Any:
    """What a factory returns when called without arguments; an object that is no factory itself.

    Raises:
        InputError: if it cannot be found, or raises.
    """
    found = find(spec)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{spec} must be a factory that is called without arguments, but it raised {type(error).__name__}: {error}"
        ) from error


def build_model(spec: str) -> nn.Module:
    """A model.

    Raises:
        InputError: as `build`; or if it returns something else.
    """
    model = build(spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module, but returned {type(model).__name__}")
    return model


def kept_clean(*, as_json: bool) -> AbstractContextManager[Any]:
    """Within it, what others print goes to stderr, if stdout is for JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, from safetensors by its suffix, else from `torch.save`; all keys must match.

    Raises:
        InputError: if the file is no state_dict, holds anything but data, or does not fit the model.
        MissingExtraError: if safetensors is not installed.
    """
    reader = _safetensors() if path.suffix == SAFETENSORS else None
    try:
        state = reader.load_file(path) if reader else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except Exception as error:  # pickle and safetensors raise anything on bytes that are not theirs
        raise InputError(
            f"{path} must be a state_dict written by torch.save, or safetensors by its suffix, and hold nothing but tensors, "
            f"but {_first_line(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} must hold a state_dict, but holds a {type(state).__name__}; save model.state_dict()")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        names = ", ".join(name if isinstance(name, str) else repr(name) for name in state)
        raise InputError(
            f"{path} must hold a state_dict, names with tensors, but holds {names[:200]}; save model.state_dict()"
        )
    try:
        model.load_state_dict(state)
    except Exception as error:  # torch and the model's own hooks raise anything on tensors of another kind
        raise InputError(f"{path} must fit the model, but {error}") from error


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state_dict whole or not at all, as safetensors by its suffix, else with `torch.save`.

    Raises:
        InputError: if the place cannot be written, or the format cannot hold the state.
        MissingExtraError: if safetensors is not installed.
    """
    try:
        state = model.state_dict()
    except Exception as error:  # a model may have a state_dict of its own
        raise InputError(
            f"the model must have a state_dict to write, but it raised {_first_line(error)}; nothing was written"
        ) from error
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]  # such as of get_extra_state
    if others and path.suffix == SAFETENSORS:
        raise InputError(
            f"safetensors files hold tensors only, but the model's state has {', '.join(others)[:200]}; "
            "write it with another suffix, for torch.save"
        )

    def write(temporary: Path) -> None:
        if path.suffix == SAFETENSORS:  # whose tensors may not share memory
            _safetensors().save_file({name: value.contiguous().clone() for name, value in state.items()}, temporary)
        else:
            with temporary.open(
                "wb"
            ) as file:  # an archive in a path is named after it, which a name without a suffix cannot do
                torch.save(state, file)

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside the place, and move it there when it is done.

    Raises:
        InputError: if the place cannot be written.
    """
    try:
        with whole(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another place"
        ) from error


def require_format(path: Path) -> None:
    """Refuse a suffix whose package is missing: better before an hour's work than after.

    Raises:
        MissingExtraError: if safetensors is not installed.
    """
    if path.suffix == SAFETENSORS:
        _safetensors()


def check_data(data: Any, spec: str) -> None:
    """Refuse a loader that is none, by the name it was given.

    Raises:
        ArgumentError: if it cannot be iterated.
    """
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ArgumentError(f"{spec} must return a loader of batches, but returned {type(data).__name__}")


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise MissingExtraError("safetensors files need safetensors: pip install 'batchnorm[export]'") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'it is empty'}"
