"""Separate running statistics for inputs from several domains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import Layer, SourceBuffer, Statistics, buffers_of, check_buffers, takes_weights
from batchnorm.statistics.thread import thread

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def domain(name: str) -> Iterator[None]:
    """Make layers with `Domains` use the statistics of the domain `name` in this context; other layers are unaffected.

    The context holds for the current thread and can be nested. Put it around a compiled model, not inside: the model is compiled once
    for each domain. If activation checkpointing runs the forward again, run the backward in the context too where the output depends
    on running statistics.

    Raises:
        ArgumentError: if name is not a string.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"the name of a domain must be a string, but got {name!r}")
    before, thread.domain = thread.domain, name
    try:
        yield
    finally:
        thread.domain = before


@dataclass(frozen=True, init=False)
class Domains:
    """Running statistics for each of several domains: real and generated images, clean and adversarial ones, source and target.

    In training each mini-batch comes from one domain. The source `within` normalizes it (default `Batch()`) and updates the statistics
    of this domain only. Inference uses the statistics of the domain. Weight and bias are shared. References: Radford et al. 2016,
    arXiv:1511.06434 (mini-batches all real or all generated); Li et al. 2016, arXiv:1603.04779 (domain adaptation); Xie et al. 2020,
    arXiv:1911.09665, section 4 (AdvProp's auxiliary batch normalization, which also has its own weight and bias).

    `with batchnorm.domain("fake"):` selects a domain; outside of it, the first one applies. The statistics of the first domain are the
    layer's `running_mean`, `running_var` and `num_batches_tracked`. Those of a domain `fake` are further buffers, `running_mean_fake`
    and so on, and the buffers of `within` exist for each domain too. They start as copies of the first domain's, also when a checkpoint
    without them is loaded; checkpoints with them load into any layer of this library. `revert` removes them.

    Args:
        names: the domains, at least one, the first is the default; all different, neither empty nor with a dot.
        within: the source that each domain uses.

    Raises:
        ArgumentError: if a name is not a string, or within is not a source that a domain can use.
        InputError: on names that cannot name buffers; if the current domain is not among the names.
        StateError: when used by a layer without running statistics.
    """

    names: tuple[str, ...]
    within: Statistics = field(default=Batch())

    def __init__(self, names: tuple[str, ...] | list[str], within: Statistics | None = None) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ArgumentError(f"names must be a sequence of strings, one for each domain, but got {names!r}")
        if not names or len(set(names)) < len(names) or any(not name or "." in name for name in names):
            raise InputError(
                f"names must be at least one, all different, neither empty nor with a dot (they name buffers), but got {names!r}"
            )
        if within is not None and (isinstance(within, (type, Domains)) or not callable(within)):
            raise ArgumentError(f"within must be a statistics source such as Batch() or Renorm(), but got {within!r}")
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "within", Batch() if within is None else within)
        taken = [
            name
            for name in self.names[1:]
            if buffers_of(self.within).keys() & {_of(buffer, name) for buffer in _BUFFERS}
        ]
        if taken:
            raise InputError(
                f"the buffers of a domain must not have the names of those of {self.within}, but got {taken[0]!r}; choose another name"
            )

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        layer, within = self.in_domain(layer), self.within
        if weights is None:
            return within(layer, x, residual, mask)
        given: Any = within  # it takes them, or the layer would have refused them
        return given(layer, x, residual, mask, weights)

    @property
    def takes_weights(self) -> bool:
        """Whether the source within does."""
        return takes_weights(self.within)

    def layer_buffers(self) -> dict[str, SourceBuffer]:
        within = buffers_of(self.within)
        separate = {buffer: SourceBuffer(buffer) for buffer in _BUFFERS} | within
        others = {
            _of(buffer, name): spec._replace(like=spec.like if buffer in _BUFFERS else _of(spec.like, name))
            for name in self.names[1:]
            for buffer, spec in separate.items()
        }
        return within | others

    def in_domain(self, layer: Layer) -> Layer:
        """The layer, or a stand-in for it whose buffers are those of the current domain."""
        if layer.running_mean is None:
            raise StateError(
                "domains need running statistics, but this layer has none; build it with track_running_stats=True"
            )
        name = thread.domain
        if name is None or name == self.names[0]:
            return layer
        if name not in self.names:
            raise InputError(
                f"the domain must be one of the layer's, {', '.join(map(repr, self.names))}, but the context says {name!r}; "
                "name it in Domains(...)"
            )
        check_buffers(layer, _of("running_mean", name), _of("running_var", name))
        return cast(Layer, _InDomain(layer, name, (*_BUFFERS, *buffers_of(self.within))))


def _of(buffer: str, domain: str) -> str:
    """The name of a domain's own buffer."""
    return f"{buffer}_{domain}"


class _InDomain:
    """A stand-in for a layer whose buffers are those of a domain; everything else is the layer's."""

    def __init__(self, owner: Layer, domain: str, buffers: tuple[str, ...]) -> None:
        self.owner, self.domain = owner, domain
        for buffer in buffers:
            setattr(self, buffer, getattr(owner, _of(buffer, domain)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)
