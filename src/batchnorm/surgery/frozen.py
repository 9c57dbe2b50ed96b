"""Frozen batch norms of other libraries (torchvision, detectron2, timm ...) as layers of ours, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from batchnorm.layers import BatchNorm
from batchnorm.statistics import Running

_BEFORE = "_before_conversion"
_EPS = 1e-5  # of those that have no attribute for it


class FrozenBatchNorm(BatchNorm):
    """What a frozen batch norm of another library becomes: `statistics=Running()`, weight and bias are buffers, no counter.

    `unfreeze` lets its statistics move; weight and bias stay what they are.
    """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Checkpoints with a counter load, too, and those without one need none, whatever version they say they are."""
        state_dict.pop(prefix + "num_batches_tracked", None)
        metadata = {**local_metadata, "version": self._version}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)


def prepare(module: nn.Module) -> None:
    """Give a module that `is_frozen_norm` what a layer of ours has."""
    mean = module._buffers["running_mean"]
    assert mean is not None
    given = {"num_features": mean.numel(), "eps": _EPS, "momentum": 0.1, "affine": True, "track_running_stats": True}
    added = {name: value for name, value in given.items() if name not in module.__dict__}
    counted = "num_batches_tracked" in module._buffers
    if not counted:
        module.register_buffer("num_batches_tracked", None)
    module.__dict__ |= {**added, "statistics": Running(), _BEFORE: (type(module), tuple(added), counted)}


def class_before(layer: BatchNorm) -> type[nn.Module]:
    """The class of another library that a layer was of."""
    return layer.__dict__[_BEFORE][0]


def clear(layer: BatchNorm) -> None:
    """Take away what `prepare` gave."""
    _, added, counted = layer.__dict__.pop(_BEFORE)
    for name in added:
        layer.__dict__.pop(name, None)
    if not counted:
        del layer._buffers["num_batches_tracked"]


def not_frozen(module: nn.Module) -> str | None:
    """Why a module that looks like a frozen batch norm is none: it computes something else. Else None."""
    twin: Any = copy.deepcopy(module).double()
    C = twin.running_mean.numel()
    probe = torch.randn(2, C, 3, 3, generator=torch.Generator().manual_seed(0)).to(twin.running_mean)
    eps = getattr(module, "eps", _EPS)
    wanted = nn.functional.batch_norm(probe, twin.running_mean, twin.running_var, twin.weight, twin.bias, eps=eps)
    try:
        torch.testing.assert_close(twin.forward(probe.clone()), wanted)  # not called: hooks are the user's
    except Exception as error:  # whatever its forward raises
        return f"it is a {type(module).__name__}, which computes something else ({type(error).__name__})"
    return None
