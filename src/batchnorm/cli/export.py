"""Exports models as torch.export's .pt2 or as ONNX, with a dynamic batch size; loads the file again and compares outputs."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.cli.models import write_whole
from batchnorm.errors import InputError, MissingExtraError
from batchnorm.folding.record import call, difference, tensors

PROGRAMS = (".pt2", ".onnx")


def require_exporter(path: Path) -> None:
    """Check that the packages for the suffix are installed.

    Raises:
        MissingExtraError: if one is not.
    """
    for package in ("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"ONNX files need {package}: pip install 'batchnorm[export]'") from error


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, *, fixed_batch: bool = False
) -> float:
    """Write a model as a program, completely or not at all, and return the largest difference between its outputs and the model's.

    Unless `fixed_batch`, the first axis is dynamic in all example tensors that have the batch size of the first one. An example of one
    sample is doubled for that, since the exporter treats a size of 1 as a constant.

    Raises:
        InputError: if the model cannot be exported, or the file cannot be written.
    """
    if not fixed_batch:
        args, kwargs = _doubled(args), _doubled(kwargs)
    shapes = None if fixed_batch else (*_free(args), *_free(tuple(kwargs.values())))
    found: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporters, not from the model
        program = _program(model, args, kwargs, shapes, onnx=path.suffix == ".onnx")

        def write(temporary: Path) -> None:
            if isinstance(program, torch.export.ExportedProgram):
                torch.export.save(program, temporary)
                outputs = call(torch.export.load(temporary).module(), args, kwargs)
            else:
                program.save(temporary)
                outputs = _run_onnx(temporary, args, kwargs)
            found.append(difference(outputs, list(tensors(call(model, args, kwargs)))))

        write_whole(path, write)
    return found[0]


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, *, onnx: bool) -> Any:
    try:
        if onnx:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            return torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # exporters may raise anything
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = "" if shapes is None else "; --fixed-batch exports it without a dynamic batch size"
        raise InputError(
            f"the model must be one that torch can export, but {type(error).__name__}: {text}{remedy}"
        ) from error


def _batch(values: Any) -> int | None:
    return next((leaf.shape[0] for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()), None)


def _doubled(values: Any) -> Any:
    if _batch(values) != 1:
        return values
    return tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x, values)


def _free(values: tuple[Any, ...]) -> tuple[Any, ...]:
    batch = _batch(values)
    return tree_map_only(
        Tensor, lambda x: {0: torch.export.Dim.DYNAMIC} if x.dim() and x.shape[0] == batch else {}, values
    )


def _run_onnx(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    given = [leaf.numpy() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, given, strict=True)))]
