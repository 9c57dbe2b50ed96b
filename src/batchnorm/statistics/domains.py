"""Separate running statistics for inputs from several domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import (
    Layer,
    SourceBuffer,
    SourceParameter,
    Statistics,
    buffers_of,
    check_buffers,
    parameters_of,
    takes_weights,
)
from batchnorm.statistics.thread import thread

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")


@contextmanager
def domain(name: str | int) -> Iterator[None]:
    """Make layers with `Domains` use the statistics of the domain `name` in this context; other layers are unaffected.

    The context holds for the current thread and can be nested. Put it around a compiled model, not inside: the model is compiled once
    for each domain. If activations are checkpointed, run the backward in the context too: it runs the forward again, in the domain that
    it finds.

    Raises:
        ArgumentError: if name is neither a string nor an integer.
    """
    if not _is_name(name):
        raise ArgumentError(f"the name of a domain must be a string or an integer, but got {name!r}")
    before, thread.domain = thread.domain, str(name)
    try:
        yield
    finally:
        thread.domain = before


@dataclass(frozen=True, init=False)
class Domains:
    """Running statistics for each of several domains: real and generated images, clean and adversarial ones, source and target.

    In training each mini-batch comes from one domain. The source `within` normalizes it (default `Batch()`) and updates the statistics
    of this domain only. Inference uses the statistics of the domain. Weight and bias are shared, unless `affine` says otherwise.
    References: Radford et al. 2016, arXiv:1511.06434 (mini-batches all real or all generated); Li et al. 2016, arXiv:1603.04779 (domain
    adaptation); Xie et al. 2020, arXiv:1911.09665, section 4 (AdvProp's auxiliary batch normalization, with `affine`); Antoniou et al.
    2019, arXiv:1810.09502 (the inner steps of MAML++ as domains, with `affine`).

    `with batchnorm.domain("fake"):` selects a domain; outside of it, the first one applies. The statistics of the first domain are the
    layer's `running_mean`, `running_var` and `num_batches_tracked`. Those of a domain `fake` are further buffers, `running_mean_fake`
    and so on, and the buffers of `within` exist for each domain too. They start as copies of the first domain's, also when a checkpoint
    without them is loaded; checkpoints with them load into any layer of this library. `revert` removes them. The same holds for the
    parameters of `within`, and with `affine` for `statistics_weight_fake` and `statistics_bias_fake`; the first domain's are the layer's
    own weight and bias. An optimizer must be created, or told, after the layer has them.

    Args:
        names: the domains, at least one, the first is the default; all different, neither empty nor with a dot. Integers, such as
            `range(5)` for five steps, name domains too: "0" to "4".
        within: the source that each domain uses.
        affine: whether each domain learns a weight and a bias of its own, where the layer has them.

    Raises:
        ArgumentError: if a name is neither a string nor an integer, or within is not a source that a domain can use.
        InputError: on names that cannot name buffers; if the current domain is not among the names.
        StateError: when used by a layer without running statistics.
    """

    names: tuple[str, ...]
    within: Statistics = field(default=Batch())
    affine: bool = field(default=False)

    def __init__(
        self, names: Sequence[str] | Sequence[int], within: Statistics | None = None, *, affine: bool = False
    ) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(map(_is_name, names)):
            raise ArgumentError(
                f"names must be a sequence of strings or integers, one for each domain, but got {names!r}"
            )
        names = tuple(map(str, names))
        if not names or len(set(names)) < len(names) or any(not name or "." in name for name in names):
            raise InputError(
                f"names must be at least one, all different, neither empty nor with a dot (they name buffers), but got {names!r}"
            )
        if within is not None and (isinstance(within, (type, Domains)) or not callable(within)):
            raise ArgumentError(f"within must be a statistics source such as Batch() or Renorm(), but got {within!r}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "within", Batch() if within is None else within)
        object.__setattr__(self, "affine", affine)
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

    def layer_parameters(self) -> dict[str, SourceParameter]:
        within = parameters_of(self.within)
        others = {_of(parameter, name): SourceParameter(parameter) for name in self.names[1:] for parameter in within}
        affine = self.names[1:] if self.affine else ()
        return (
            within
            | others
            | {_of(f"statistics_{role}", name): SourceParameter(role) for name in affine for role in _AFFINE}
        )

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
        own = {value: _of(value, name) for value in (*_BUFFERS, *buffers_of(self.within), *parameters_of(self.within))}
        if self.affine:
            own |= {role: _of(f"statistics_{role}", name) for role in _AFFINE}
        return cast(Layer, _InDomain(layer, name, own))


def _of(value: str, domain: str) -> str:
    """The name of a domain's own buffer or parameter."""
    return f"{value}_{domain}"


def _is_name(name: Any) -> bool:
    return isinstance(name, str) or (isinstance(name, int) and not isinstance(name, bool))


class _InDomain:
    """A stand-in for a layer whose buffers, and some parameters, are those of a domain; everything else is the layer's.

    `own` says for each of them what the layer calls it.
    """

    def __init__(self, owner: Any, domain: str, own: dict[str, str]) -> None:
        self.owner, self.domain = owner, domain
        for name, in_owner in own.items():
            setattr(self, name, getattr(owner, in_owner, None))  # None: a weight or a bias that the layer lacks
        self.gamma = self.weight if "weight" in own else owner.gamma
        self.beta = self.bias if "bias" in own else owner.beta

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)
