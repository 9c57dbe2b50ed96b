"""Gradients of single samples, and differential privacy: which layers mix the samples of a batch, and what opacus makes of them.

Differentially private training clips the gradient of each sample. In training, a batch norm computes the output of a sample from all
samples of the batch, so no gradient belongs to one sample alone, and clipping bounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError, MissingExtraError, StateError
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Running
from batchnorm.surgery import batch_norms, convert
from batchnorm.surgery.alternatives import Alternative
from batchnorm.surgery.convert import why_not_replaced


def mixing(model: nn.Module) -> list[str]:
    """The names of the batch norms of a model that would now normalize by the batch, and so mix its samples.

    These are batch norms in training that are not frozen, and those without running statistics in any mode. Whether weight and bias are
    trainable does not matter. Hand-written layers are not recognized.

    Raises:
        ArgumentError: if model is not a module.
    """
    return [name for name, layer in batch_norms(model).items() if _mixes(layer)]


def per_sample_gradients(
    model: nn.Module, criterion: Callable[[Any, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The gradient of each sample's loss for each trainable parameter, by `torch.func`: (N, *parameter.shape) by name.

    The model runs as it is; no layer may mix samples, so call `model.eval()`, `batchnorm.freeze(model)` or
    `batchnorm.convert(model, to="group")` first. Buffers do not change. Memory grows with N times the number of parameters.

    Args:
        model: from (1, ...) to the first argument of criterion.
        criterion: the loss of a batch of one sample, a scalar.
        inputs: (N, ...).
        targets: (N, ...).

    Raises:
        StateError: if batch norms mix the samples.
    """
    mixed = mixing(model)
    if mixed:
        raise StateError(
            f"no batch norm may mix the samples, but {', '.join(mixed)} {'does' if len(mixed) == 1 else 'do'}; call model.eval(), "
            "batchnorm.freeze(model) or batchnorm.convert(model, to='group') first"
        )
    trainable = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    buffers = {name: value.detach() for name, value in model.named_buffers()}

    def loss(parameters: dict[str, Tensor], input: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {**parameters, **buffers}, (input.unsqueeze(0),))
        return criterion(output, target.unsqueeze(0))

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    return of_each(trainable, inputs, targets)


def use_in_opacus(channels_per_group: int = 8) -> None:
    """Register with opacus' `ModuleValidator`, for this process: it refuses our batch norms too, and its `fix` makes larger groups.

    Opacus recognizes batch norms by their exact class. So `validate` accepts ours although they mix samples, and `fix` replaces torch's
    by gcd(32, C) groups: with 16 or 32 channels a group has one channel, and of input (N, C) nothing is left but the bias. It also drops
    weight, bias and eps. Afterwards `validate` accepts ours only where they do not mix samples, frozen ones for example, and `fix`
    calls `convert(to="group")` for torch's and ours. Layers without trainable parameters are not shown to validators; `mixing` names
    them.

    Args:
        channels_per_group: the fewest channels in a group, as in `convert`.

    Raises:
        MissingExtraError: opacus is not installed.
        InputError: if channels_per_group is below 2; later, from `fix`, if a batch norm cannot be replaced.
    """
    alternative = Alternative("group", channels_per_group)
    try:
        from opacus.validators import register_module_fixer, register_module_validator  # pyright: ignore[reportMissingImports]
        from opacus.validators.errors import ShouldReplaceModuleError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("use_in_opacus needs opacus, which is not installed: pip install opacus") from error

    def validate(layer: nn.Module) -> list[Exception]:
        message = "it normalizes by the batch and mixes its samples; call batchnorm.convert(model, to='group') or batchnorm.freeze(model)"
        return [ShouldReplaceModuleError(f"{type(layer).__name__}: {message}")] if _mixes(layer) else []

    def fix(layer: nn.Module, **_: Any) -> nn.Module:
        if not _mixes(layer):
            return layer
        reason = why_not_replaced(layer, alternative).get(id(layer))
        if reason:
            raise InputError(f"opacus cannot replace {layer}: {reason}")
        return convert(layer, to="group", channels_per_group=channels_per_group)

    register_module_validator(_OURS)(validate)
    register_module_fixer([*_OURS, *_TORCHS])(fix)


def _subclasses(cls: type) -> list[type]:
    return [cls, *(each for child in cls.__subclasses__() for each in _subclasses(child))]


_TORCHS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
_OURS = [cls for cls in _subclasses(BatchNorm) if cls.__module__.startswith("batchnorm.")]


def _mixes(layer: nn.Module) -> bool:
    """Whether a batch norm normalizes by the batch in its present mode."""
    if not isinstance(layer, _BatchNorm) or isinstance(getattr(layer, "statistics", None), Running):
        return False
    return layer.training or layer.running_mean is None
