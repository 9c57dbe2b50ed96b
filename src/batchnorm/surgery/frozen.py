"""Frozen batch norms of other libraries (torchvision, detectron2, timm ...) converted to ours, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.layers import BatchNorm
from batchnorm.statistics import Running
from batchnorm.surgery.subclasses import Rest, derived, rest_of_layer

_BEFORE = "_before_conversion"
_EPS = 1e-5  # for modules without an attribute `eps`


class FrozenBatchNorm(BatchNorm):
    """A converted frozen batch norm of another library: `statistics=Running()`, weight and bias are buffers, no counter.

    After `unfreeze` its running statistics are updated in training; weight and bias stay buffers.
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
        """Load checkpoints with and without a counter, whatever their version."""
        state_dict.pop(prefix + "num_batches_tracked", None)
        metadata = {**local_metadata, "version": self._version}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)


def prepare(module: nn.Module) -> None:
    """Add the attributes of our layers to a module for which `is_frozen_norm` is true."""
    mean = module._buffers["running_mean"]
    assert mean is not None
    given = {"num_features": mean.numel(), "eps": _EPS, "momentum": 0.1, "affine": True, "track_running_stats": True}
    added = {name: value for name, value in given.items() if name not in module.__dict__}
    counted = "num_batches_tracked" in module._buffers
    if not counted:
        module.register_buffer("num_batches_tracked", None)
    module.__dict__ |= {**added, "statistics": Running(), _BEFORE: (type(module), tuple(added), counted)}


def class_before(layer: BatchNorm) -> type[nn.Module]:
    """The class that a layer had in the other library."""
    return layer.__dict__[_BEFORE][0]


def clear(layer: BatchNorm) -> None:
    """Remove what `prepare` added."""
    _, added, counted = layer.__dict__.pop(_BEFORE)
    for name in added:
        layer.__dict__.pop(name, None)
    if not counted:
        del layer._buffers["num_batches_tracked"]


def target_class(module: nn.Module) -> type[nn.Module] | str:
    """Our class for a module for which `is_frozen_norm` is true, or the reason why there is none."""
    rest = rest_of_layer(module, _frozen)
    if isinstance(rest, str):
        return rest
    return FrozenBatchNorm if rest == Rest() else derived(FrozenBatchNorm, type(module), rest)


def _frozen(module: Any, x: Tensor) -> Tensor:
    statistics = module.running_mean, module.running_var
    return F.batch_norm(x, *statistics, module.weight, module.bias, eps=getattr(module, "eps", _EPS))
