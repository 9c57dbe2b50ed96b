"""The tasks of meta-learning: statistics of a support set, which normalize the queries of the same task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import StateError
from batchnorm.statistics.contract import Layer, owner_of
from batchnorm.statistics.thread import thread


class Support(NamedTuple):
    """The moments of a support set in one call of a layer, with their autograd graph.

    Attributes:
        mean, variance: (1, C, 1, ...), as many axes as the layer's input; the variance is biased.
        samples: of the support set.
    """

    mean: Tensor
    variance: Tensor
    samples: int


class _Calls:
    """The calls of each layer in one pass, by layer and domain: what they stored, or how many there were."""

    def __init__(self) -> None:
        self.stored: dict[tuple[int, str | None], list[Support]] = {}
        self.number: dict[tuple[int, str | None], int] = {}
        self.layers: list[Any] = []  # so that no other layer gets the id of one of them


class Episode:
    """One task of meta-learning: layers with `TaskNorm` normalize its queries by statistics of its support set.

        episode = bn.Episode()
        with episode.support():
            features = model(support_images)
        with episode.query():
            predictions = model(query_images)

    The pass over the support set stores the moments of its batch in each such layer, with their autograd graph, so that the loss of
    the queries also learns through them. The episode holds them, not the model: several episodes may use a model in turn, and a copy or
    a checkpoint of the model contains none. Other layers ignore episodes.

    Each `with episode.support():` begins anew and holds one forward of the model. In an inner loop, enter it at each step; the
    queries then use the statistics under the last weights. `with episode.query():` may hold any number of forwards; none of them
    stores anything or updates running statistics, so the predictions of a query do not depend on the other queries.

    The contexts hold for the current thread, and the innermost one counts. An error in `support` restores what was stored before.

    Raises:
        StateError: from a layer, if there is no pass over a support set that it could use, if it was called another number of times
            there, in compiled code, and if activation checkpointing recomputes it.
    """

    def __init__(self) -> None:
        self._calls = _Calls()

    @contextmanager
    def support(self) -> Iterator[None]:
        """Forward the support set in this context, once."""
        before, outer = self._calls, thread.episode
        self._calls, thread.episode = _Calls(), _Pass(self, None)
        try:
            yield
        except BaseException:
            self._calls = before
            raise
        finally:
            thread.episode = outer

    @contextmanager
    def query(self) -> Iterator[None]:
        """Forward queries in this context, after the support set."""
        here, outer = _Pass(self, _Calls()), thread.episode
        thread.episode = here
        try:
            yield
            here.check_end()
        finally:
            thread.episode = outer


class _Pass:
    """A pass over the support set, or, with `queried`, over queries."""

    def __init__(self, episode: Episode, queried: _Calls | None) -> None:
        self._episode, self._queried = episode, queried

    @property
    def over_queries(self) -> bool:
        return self._queried is not None

    def store(self, layer: Layer, support: Support) -> None:
        """Store the moments of the support set in this call of the layer."""
        calls = self._episode._calls
        calls.stored.setdefault(_key(layer), []).append(support)
        calls.layers.append(owner_of(layer))

    def look_up(self, layer: Layer) -> Support:
        """The moments of the support set in the corresponding call: in a layer that is called twice, of the first or second one."""
        assert self._queried is not None
        key = _key(layer)
        found = self._episode._calls.stored.get(key)
        if not found:
            in_domain = "" if key[1] is None else f" in the domain {key[1]!r}"
            raise StateError(
                f"queries are normalized by statistics of the support set, but it did not reach this layer{in_domain}; forward it first, "
                "within `with episode.support():`"
            )
        number = self._queried.number.get(key, 0)
        self._queried.number[key] = number + 1
        return found[number % len(found)]

    def check_end(self) -> None:
        """Check that the queries called each layer as often in a forward as the support set did.

        Raises:
            StateError: if not, since moments then belong to another call.
        """
        assert self._queried is not None
        for key, number in self._queried.number.items():
            stored = len(self._episode._calls.stored.get(key, ()))
            if stored and number % stored:
                raise StateError(
                    f"a forward of queries must call a layer as often as that of the support set, but a layer was called {number} times "
                    f"with queries and {stored} times with the support set; hold one forward in each `with episode.support():`, so "
                    "enter it at each step of an inner loop"
                )


def current_pass() -> _Pass | None:
    """The pass of an episode that runs now; None outside of an episode.

    Raises:
        StateError: in compiled code, which cannot store moments between calls.
    """
    if thread.episode is not None and torch.compiler.is_compiling():
        raise StateError(
            "an episode stores moments between calls, which compiled code cannot; call the model uncompiled in an episode"
        )
    return thread.episode


def _key(layer: Layer) -> tuple[int, str | None]:
    owner = owner_of(layer)
    return id(owner), None if owner is layer else getattr(layer, "domain", None)
