"""What stands between a diagnosis and the plain model: data-parallel and compiled wrappers, and layers that refuse the CPU."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that would exchange buffers or run compiled code, which ignores hooks."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


class _OnCPU(nn.SyncBatchNorm):
    """torch's synchronized layer raises on the CPU."""

    forward = _BatchNorm.forward


def let_run_on_cpu(models: Iterable[nn.Module]) -> None:
    """Let torch's synchronized layers with buffers on the CPU normalize by their own batch; who restores the models restores the class."""
    for module in (module for model in models for module in model.modules()):
        if type(module) is nn.SyncBatchNorm and any(value.device.type == "cpu" for value in module.buffers()):
            module.__class__ = _OnCPU
