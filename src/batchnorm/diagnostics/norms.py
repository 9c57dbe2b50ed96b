"""Finds the batch norms of a model: torch's and ours with their subclasses, frozen ones of other libraries, and hand-written ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.interop.tutorial import is_hand_written
from batchnorm.layers import BatchNorm
from batchnorm.statistics import MovingAverage
from batchnorm.statistics.contract import in_domain, is_frozen
from batchnorm.surgery import is_frozen_norm
from batchnorm.surgery.held import HeldInInference
from batchnorm.surgery.walker import slots_of

Kind = Literal["torch", "ours", "frozen", "hand-written"]

_CALLED_BATCH_NORM = re.compile(r"batch_?norm|^bn|bn\d?d?$", re.IGNORECASE)
_NAMES = {  # what hand-written layers call their tensors
    "mean": re.compile(r"mean|(^|_)mu$", re.IGNORECASE),
    "var": re.compile(r"var|std|sigma", re.IGNORECASE),
    "weight": re.compile(r"^(gamma|scale|weight)$", re.IGNORECASE),
    "bias": re.compile(r"^(beta|shift|bias|offset)$", re.IGNORECASE),
}
_DEVIATION = re.compile(r"(std|sigma)$", re.IGNORECASE)  # not sigma2, sigma_sq


class Norm(NamedTuple):
    """A batch norm of a model.

    Attributes:
        name: its first name in `named_modules`; "" for the root.
        module: the layer.
        kind: whose layer it is.
    """

    name: str
    module: Any
    kind: Kind

    @property
    def shown(self) -> str:
        """The name for readers."""
        return self.name or "the model"

    @property
    def lazy(self) -> bool:
        """Whether it has no values yet: it has had no input, or is on the meta device."""
        values = (*self.module.parameters(recurse=False), *self.module.buffers(recurse=False))
        return not all(map(has_values, values))

    @property
    def frozen(self) -> bool:
        """Whether it normalizes by its running statistics in training mode too."""
        return self.kind == "frozen" or is_frozen(self.module) or isinstance(self.module, HeldInInference)

    @property
    def eps(self) -> float | None:
        """The constant added to the variance; None where a hand-written layer has no such attribute."""
        eps = getattr(self.module, "eps", None)
        return float(eps) if isinstance(eps, (int, float)) else None

    @property
    def momentum(self) -> float | None:
        """The weight of a new batch; None for a cumulative average, and where there is no such attribute."""
        momentum = getattr(self.module, "momentum", None)
        return float(momentum) if isinstance(momentum, (int, float)) else None

    @property
    def batches(self) -> int | None:
        """The number of batches in the running statistics; None if they are not counted."""
        count = getattr(in_domain(self.module), "num_batches_tracked", None)
        return int(count) if isinstance(count, Tensor) and has_values(count) else None

    @property
    def domain(self) -> str | None:
        """The domain whose running statistics it uses now; None if it is the first one, or there are none."""
        stand_in = in_domain(self.module)
        return None if stand_in is self.module else stand_in.domain

    @property
    def averages(self) -> bool:
        """Whether it normalizes by the statistics of several batches."""
        source = getattr(self.module, "statistics", None)
        return self.kind == "ours" and isinstance(getattr(source, "within", source), MovingAverage)

    @property
    def ranks(self) -> int:
        """The number of processes whose batches it normalizes together."""
        if self.kind == "ours":
            return 1 if self.module.reducer is None else self.module.reducer.size
        if (
            not isinstance(self.module, nn.SyncBatchNorm)
            or not distributed.is_available()
            or not distributed.is_initialized()
        ):
            return 1
        return distributed.get_world_size(self.module.process_group)

    @property
    def updates(self) -> bool:
        """Whether its running statistics change in training mode."""
        tracks = getattr(self.module, "track_running_stats", True)
        has = self.statistics() is not None or (self.lazy and self.kind in ("torch", "ours"))
        return has and not self.frozen and bool(tracks)

    @property
    def started(self) -> bool:
        """Whether its running statistics have had a batch, or were loaded: they are counted, or not the initial 0 and 1."""
        pair = self.statistics()
        return pair is not None and (bool(self.batches) or bool((pair[0] != 0).any() or (pair[1] != 1).any()))

    @property
    def learned(self) -> bool:
        """Whether weight and bias have been trained: a constant weight, or a bias of zeros, is an initialization."""
        affine = {name: value.detach() for name, value in self.affine().items()}
        if len(affine) < 2 or affine["weight"].numel() < 2:
            return False
        weight, bias = affine["weight"].flatten(), affine["bias"]
        return bool((weight != weight[0]).any()) and bool((bias != 0).any())

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance, (C,) float64 each; None if it has none, or none yet."""
        pair = [self.tensor("mean"), self.tensor("var")]
        if any(value is None or value.is_complex() for value in pair):
            return None
        mean, var = (value.detach().double().flatten() for value in pair if value is not None)
        if self.keeps_deviations:
            var = var.square()
        return (mean, var) if mean.shape == var.shape and mean.numel() else None

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Write running mean and variance, (C,) each, if it has them."""
        for role, value in (("mean", mean), ("var", var.sqrt() if self.keeps_deviations else var)):
            tensor = self.tensor(role)
            if tensor is not None and tensor.numel() == value.numel():
                tensor.detach().copy_(value.view_as(tensor))

    @property
    def keeps_deviations(self) -> bool:
        """Whether a hand-written layer keeps standard deviations instead of variances, by the attribute's name."""
        return self.kind == "hand-written" and _DEVIATION.search(self.name_of("var")) is not None

    def affine(self) -> dict[str, Tensor]:
        """The tensors of scale and offset that it has, by the names of torch."""
        found = {name: self.tensor(name) for name in ("weight", "bias")}
        return {name: value for name, value in found.items() if value is not None}

    def tensor(self, role: str) -> Tensor | None:
        """The tensor in the role "mean", "var", "weight" or "bias"; None if there is none, or it has no values yet."""
        if self.kind == "hand-written":
            value = hand_written_tensors(self.module).get(role)
        else:
            name = {"mean": "running_mean", "var": "running_var"}.get(role, role)
            value = getattr(in_domain(self.module), name, None)
        return value if isinstance(value, Tensor) and has_values(value) else None

    def name_of(self, role: str) -> str:
        """What the layer calls a tensor."""
        value = self.tensor(role)
        return next((name for name, each in own_tensors(self.module) if each is value), role)


def has_values(value: Tensor) -> bool:
    """Whether a tensor is neither that of a lazy layer without input nor on the meta device."""
    return not is_lazy(value) and not value.is_meta


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module itself: parameters, buffers, and plain attributes."""
    for table in (module._parameters, module._buffers, vars(module)):
        for name, value in table.items():
            if isinstance(value, Tensor):
                yield name, value


def hand_written_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a hand-written batch norm by their roles: those of one size, or statistics of each position (C, *S) of images."""
    values = [(name, value) for name, value in own_tensors(module) if not is_lazy(value) and value.is_floating_point()]
    found = dict[str, Tensor]()
    for role, pattern in _NAMES.items():
        value = next((each for name, each in values if pattern.search(name)), None)
        if value is not None:
            found[role] = value
    sizes = {value.numel() for value in found.values()}
    return found if len(sizes) == 1 or _is_per_position(found) else {}


def _is_per_position(tensors: dict[str, Tensor]) -> bool:
    """Whether the statistics have several values for each channel of the affine."""
    if tensors.keys() != _NAMES.keys() or len({tensors[role].numel() for role in ("weight", "bias")}) > 1:
        return False
    mean, channels = tensors["mean"], tensors["weight"].numel()
    return mean.shape == tensors["var"].shape and mean.dim() > 1 and channels > 1 and channels in mean.shape


def norms_of(model: nn.Module) -> list[Norm]:
    """Each batch norm of a model once, by its first name, in the order of `named_modules`.

    Raises:
        ArgumentError: if model is not a module.
    """
    found = dict[int, Norm]()
    for slot in slots_of(model):
        kind = _kind(slot.module)
        if kind is not None:
            found.setdefault(id(slot.module), Norm(slot.path, slot.module, kind))
    return list(found.values())


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, BatchNorm):
        return "ours"
    if isinstance(module, _BatchNorm):
        return "torch"
    if is_frozen_norm(module):
        return "frozen"
    return "hand-written" if is_hand_written(module) or _looks_hand_written(module) else None


def _looks_hand_written(module: nn.Module) -> bool:
    """Whether a leaf of a class that is not torch's has statistics and an affine, or an affine and the name of a batch norm."""
    if type(module).__module__.startswith("torch.") or any(True for _ in module.children()):
        return False
    roles = hand_written_tensors(module).keys()
    if not {"weight", "bias"} <= roles:
        return False
    return {"mean", "var"} <= roles or _CALLED_BATCH_NORM.search(type(module).__name__) is not None
