"""Loads a user's model and data, named as `package.module:factory`, and weights, without running code from the file."""

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
    """Import the object `package.module:name`; the current folder is searched first, as by `python -m`.

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
        for attribute in name.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:  # a script without a guard may call sys.exit
        raise InputError(
            f"{spec} must be importable from {os.getcwd()}, but {type(error).__name__}: {error}; check the name, or start "
            "where the package can be found"
        ) from error
    return found


def build(spec: str) -> Any:
    """The result of a factory, called without arguments; an object that is not a factory is returned itself.

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
    """Build a model.

    Raises:
        InputError: as in `build`; or if the result is not a module.
    """
    model = build(spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module, but returned {type(model).__name__}")
    return model


def redirected(*, as_json: bool) -> AbstractContextManager[Any]:
    """With `as_json`, redirect all other output to stderr, so that stdout has only JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict, from safetensors by its suffix, else from `torch.save`; all keys must match.

    Raises:
        InputError: if the file is not a state_dict, contains anything but data, or does not fit the model.
        MissingExtraError: if safetensors is not installed.
    """
    reader = _safetensors() if path.suffix == SAFETENSORS else None
    try:
        state = reader.load_file(path) if reader else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except Exception as error:  # pickle and safetensors may raise anything on foreign bytes
        raise InputError(
            f"{path} must be a state_dict written by torch.save, or safetensors by its suffix, and contain only tensors, "
            f"but {_first_line(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} must contain a state_dict, not a {type(state).__name__}; save model.state_dict()")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        names = ", ".join(name if isinstance(name, str) else repr(name) for name in state)
        raise InputError(
            f"{path} must contain a state_dict of names and tensors, but contains {names[:200]}; save model.state_dict()"
        )
    try:
        model.load_state_dict(state)
    except Exception as error:  # torch and the model's hooks may raise anything on unsuitable tensors
        raise InputError(f"{path} must fit the model, but {error}") from error


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state_dict completely or not at all, as safetensors by its suffix, else with `torch.save`.

    Raises:
        InputError: if the file cannot be written, or the format cannot store the state.
        MissingExtraError: if safetensors is not installed.
    """
    try:
        state = model.state_dict()
    except Exception as error:  # a model may override state_dict
        raise InputError(
            f"the model must have a state_dict to write, but it raised {_first_line(error)}; nothing was written"
        ) from error
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]  # from get_extra_state
    if others and path.suffix == SAFETENSORS:
        raise InputError(
            f"safetensors files contain only tensors, but the model's state has {', '.join(others)[:200]}; "
            "write it with another suffix, for torch.save"
        )

    def write(temporary: Path) -> None:
        if path.suffix == SAFETENSORS:  # its tensors may not share memory
            _safetensors().save_file({name: value.contiguous().clone() for name, value in state.items()}, temporary)
        else:
            with temporary.open("wb") as file:  # a path names the archive inside, and torch needs a suffix for that
                torch.save(state, file)

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, and replace `path` by that file when it is complete.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        with whole(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another place"
        ) from error


def require_format(path: Path) -> None:
    """Check, before long work, that the package for the suffix is installed.

    Raises:
        MissingExtraError: if safetensors is not installed.
    """
    if path.suffix == SAFETENSORS:
        _safetensors()


def check_data(data: Any, spec: str) -> None:
    """Check that the object named `spec` can be iterated.

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
