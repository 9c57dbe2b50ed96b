"""Separate running statistics for inputs of separate kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import Kept, Layer, Statistics, check_kept, kept_by
from batchnorm.statistics.thread import thread

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def domain(name: str) -> Iterator[None]:
    """Layers with `Domains` use the statistics of the domain `name` in here; other layers do not mind. One thread's own; nests.

    Around a compiled model, not inside it: the model is compiled once for each domain. A backward that runs the forward again
    (activation checkpointing) belongs in here too wherever the output depends on running statistics.

    Raises:
        ArgumentError: if name is no string.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"a domain is named by a string, but got {name!r}")
    before, thread.domain = thread.domain, name
    try:
        yield
    finally:
        thread.domain = before


@dataclass(frozen=True, init=False)
class Domains:
    """Running statistics for each of several domains: real and generated images, clean and adversarial ones, source and target.

    In training each mini-batch comes from one domain and is normalized by `within`, `Batch()` unless said otherwise; it moves the
    statistics of its domain only. Inference uses those of its domain. Weight and bias are shared. Sources: Radford et al. 2016,
    arXiv:1511.06434 (mini-batches all real or all generated); Li et al. 2016, arXiv:1603.04779 (domain adaptation); Xie et al. 2020,
    arXiv:1911.09665, section 4 (AdvProp's auxiliary batch normalization, which has a weight and bias of its own, too).

    `with batchnorm.domain("fake"):` chooses; outside of it the first domain counts. The first domain's statistics are the layer's
    `running_mean`, `running_var` and `num_batches_tracked`; those of a domain `fake` are `running_mean_fake` and so on, buffers of
    the layer, and so is what `within` keeps. They begin as copies of the first's, also where a checkpoint without them is loaded;
    checkpoints with them load into any layer of this library. `revert` drops them, and torch's layers take what is left.

    Args:
        names: of the domains, at least one, the first the default; different, neither empty nor with a dot.
        within: the part that each domain uses.

    Raises:
        ArgumentError: if a name is no string, or within is no part that a domain can use.
        InputError: on names that cannot be buffers'; when called in a domain that is not among the names.
        StateError: when used by a layer without running statistics.
    """

    names: tuple[str, ...]
    within: Statistics = field(default=Batch())

    def __init__(self, names: tuple[str, ...] | list[str], within: Statistics | None = None) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ArgumentError(f"names must be a sequence of strings, one for each domain, but got {names!r}")
        if not names or len(set(names)) < len(names) or any(not name or "." in name for name in names):
            raise InputError(
                f"names must be at least one, different, neither empty nor with a dot (they name buffers), but got {names!r}"
            )
        if within is not None and (isinstance(within, (type, Domains)) or not callable(within)):
            raise ArgumentError(f"within must be a part such as Batch() or Renorm(), but got {within!r}")
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "within", Batch() if within is None else within)
        taken = [
            name for name in self.names[1:] if kept_by(self.within).keys() & {_of(buffer, name) for buffer in _BUFFERS}
        ]
        if taken:
            raise InputError(
                f"names must not be those of buffers of {self.within}, but got {taken[0]!r}; choose another name"
            )

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.within(self.seen_by(layer), x, residual, mask)

    def kept(self) -> dict[str, Kept]:
        within = kept_by(self.within)
        apart = {buffer: Kept(buffer) for buffer in _BUFFERS} | within
        others = {
            _of(buffer, name): kept._replace(like=kept.like if buffer in _BUFFERS else _of(kept.like, name))
            for name in self.names[1:]
            for buffer, kept in apart.items()
        }
        return within | others

    def seen_by(self, layer: Layer) -> Layer:
        """The layer with the statistics of the current domain for its own."""
        if layer.running_mean is None:
            raise StateError(
                "domains keep running statistics apart, but this layer has none; build it with track_running_stats=True"
            )
        name = thread.domain
        if name is None or name == self.names[0]:
            return layer
        if name not in self.names:
            raise InputError(
                f"the domain must be one of the layer's, {', '.join(map(repr, self.names))}, but the context says {name!r}; "
                "name it in Domains(...)"
            )
        check_kept(layer, _of("running_mean", name), _of("running_var", name))
        return cast(Layer, _InDomain(layer, name, (*_BUFFERS, *kept_by(self.within))))


def _of(buffer: str, domain: str) -> str:
    """The name of a domain's own buffer."""
    return f"{buffer}_{domain}"


class _InDomain:
    """A layer as the part within sees it: all its own but the buffers, which are the domain's."""

    def __init__(self, owner: Layer, domain: str, buffers: tuple[str, ...]) -> None:
        self.owner, self.domain = owner, domain
        for buffer in buffers:
            setattr(self, buffer, getattr(owner, _of(buffer, domain)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)
