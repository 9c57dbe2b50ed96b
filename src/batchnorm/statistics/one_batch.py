"""Statistics of one batch over parts of it that are forwarded one by one.

Each part's forward runs in a thread of its own, one thread at a time: up to the next batch norm, where it waits until all parts have come
there and the moments of all are known. So threads are coroutines here; nothing runs at the same time, and results do not depend on luck.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import checkpoint

from batchnorm.errors import InputError, StateError
from batchnorm.functional import Reducer, recomputation, recomputing
from batchnorm.functional.compiled import eager
from batchnorm.functional.joint import Call, Joint, pool
from batchnorm.functional.recompute import may_be_recomputed
from batchnorm.statistics.contract import Layer, owner_of
from batchnorm.statistics.thread import thread

Part = TypeVar("Part")
Output = TypeVar("Output")


def as_one_batch(forward: Callable[[Part], Output], parts: Iterable[Part]) -> list[Output]:
    """Forward the parts of a batch one by one, with the batch norms of this library seeing them as one batch.

    Outputs, gradients and running statistics are exactly those of the one batch (but for rounding), which move once. The parts need not
    fit into one tensor: images of several sizes, sequences of several lengths, parts on the way through data-dependent code.

        losses = bn.as_one_batch(lambda part: criterion(model(part.images), part.labels), parts)
        torch.stack(losses).mean().backward()

    A batch norm goes on only when all parts have come to it, and its backward likewise, so a part's activations are there until the
    backward, as those of the one batch would be. What spares memory there spares it here: non-reentrant checkpoints of the model's
    blocks (`torch.utils.checkpoint`), with which the forward is a pass that keeps the blocks' inputs alone, and the backward a second.

    `Ghost` has its groups within the parts; `Renorm` corrects the one batch; `MovingAverage` does not work here. Synchronized layers
    merge all parts of all replicas. `forward` runs in other threads: grad mode, autocast, device and this library's `domain`,
    `accumulate` and `recomputation` are as around the call; other contexts, such as `save_memory`, are opened within `forward`.

    Args:
        forward: called with each part; must call the same batch norms in the same order for all of them.
        parts: at least one.

    Returns:
        What `forward` returned, for each part.

    Raises:
        InputError: if there is no part.
        StateError: if parts call different batch norms; from a batch norm of torch in training (`bn.convert` the model); in a reentrant
            checkpoint, under a `torch.func` transform, and in compiled code; compiled models run as written.
        RuntimeError: from torch, if the backward is to be differentiated.
    """
    if torch.compiler.is_compiling():
        raise StateError(
            "the parts of one batch wait for each other, which compiled code cannot; call as_one_batch uncompiled"
        )
    parts = list(parts)
    if not parts:
        raise InputError("as_one_batch needs at least one part, but got none")
    if len(parts) == 1:
        return [forward(parts[0])]
    inherited = _Inherited()
    running = [_Forward(number, forward, part, inherited) for number, part in enumerate(parts)]
    running[-1].is_last = True
    answer: Tensor | None = None
    watch = register_module_forward_pre_hook(_refuse_torchs)
    try:
        with eager():
            while True:
                for one in running:
                    one.go_on(answer)
                arrivals = [one.arrival for one in running]
                if all(arrival is None for arrival in arrivals):
                    return [one.output for one in running]
                answer = _pooled(arrivals)
    finally:
        watch.remove()
        for one in running:
            one.abandon()


class _Arrival(NamedTuple):
    """A part at a batch norm."""

    layer: Layer
    replicas: Reducer | None
    own: Tensor  # its moments, as a row

    def __str__(self) -> str:
        layer = owner_of(self.layer)
        return f"{type(layer).__name__}({getattr(layer, 'num_features', '')})"


def _pooled(arrivals: list[_Arrival | None]) -> Tensor:
    first = arrivals[0]
    for number, arrival in enumerate(arrivals):
        if arrival is None or first is None or owner_of(arrival.layer) is not owner_of(first.layer):
            raise StateError(
                "the parts of one batch must call the same batch norms in the same order, but part "
                f"{number} {'had ended' if arrival is None else f'was at {arrival}'} while part 0 "
                f"{'had ended' if first is None else f'was at {first}'}; let every part take the same way through the model"
            )
    assert first is not None
    return pool([arrival.own for arrival in arrivals if arrival is not None], first.replicas)


class _Abandoned(BaseException):
    """Ends the thread of a part whose batch failed elsewhere."""


class _Forward:
    """One part on its way, as a coroutine: `go_on` runs it to its next arrival, or to its end."""

    def __init__(self, number: int, forward: Callable[[Any], Any], part: Any, inherited: _Inherited) -> None:
        self.is_last = False
        self.arrival: _Arrival | None = None
        self.output: Any = None
        self.wants_grad = torch.is_grad_enabled()
        self._answer: Tensor | None = None
        self._error: BaseException | None = None
        self._begun = self._ended = self._abandoned = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._run, args=(forward, part, inherited), name=f"part {number}", daemon=True
        )

    def go_on(self, answer: Tensor | None) -> None:
        """Let it run, with the moments of all parts for those it came with."""
        if self._ended:  # the others have not: `_pooled` will say so
            return
        self._answer = answer
        if self._begun:
            self._turn.release()
        else:
            self._begun = True
            self._thread.start()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def meet(self, arrival: _Arrival) -> Tensor:
        """Called in its thread: wait for the others."""
        if not self._abandoned:
            self.arrival = arrival
            self._back.release()
            self._turn.acquire()
        if self._abandoned:
            raise _Abandoned
        self.arrival = None
        assert self._answer is not None
        return self._answer

    def abandon(self) -> None:
        """End it wherever it is."""
        self._abandoned = True
        if self._begun:
            self._turn.release()
            self._thread.join()

    def _run(self, forward: Callable[[Any], Any], part: Any, inherited: _Inherited) -> None:
        thread.part = self
        try:
            with inherited.contexts():
                self.output = forward(part)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error  # raised again where the call was
        finally:
            self._ended = True
            self._back.release()


class _Inherited:
    """What the threads of the parts have of the one that called: what torch and this library keep for each thread."""

    def __init__(self) -> None:
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._recomputing = recomputing()
        self._window, self._domain = thread.window, thread.domain
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        self._stream = None if accelerator is None else torch.accelerator.current_stream()
        self._casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in self._kinds]
        self._cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        thread.window, thread.domain = self._window, self._domain
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self._casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._cache))
            stack.enter_context(recomputation(self._recomputing))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            yield


# Of each layer the calls whose graph is alive: a checkpoint may run them again.
_calls: WeakKeyDictionary[Any, WeakSet[Call]] = WeakKeyDictionary()


class _Meeting(Joint):
    """The reducer of a layer in a part."""

    def __init__(self, part: _Forward, layer: Layer, replicas: Reducer | None) -> None:
        self._part, self._layer, self.replicas = part, layer, replicas

    def takes(self, own: Tensor) -> bool:  # noqa: ARG002 (the signature)
        return True

    def join(self, own: Tensor) -> Tensor:
        if self._part.wants_grad and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise StateError(
                "a reentrant checkpoint runs the parts of one batch again one by one, so that their statistics cannot meet; pass "
                "use_reentrant=False to torch.utils.checkpoint"
            )
        return self._part.meet(_Arrival(self._layer, self.replicas, own))

    def seen(self, call: Call) -> None:
        if may_be_recomputed():
            _calls.setdefault(owner_of(self._layer), WeakSet()).add(call)


class _Recalled(Joint):
    """The reducer of a layer whose call for a part runs again: knows what the parts had together."""

    def __init__(self, calls: list[Call], replicas: Reducer | None) -> None:
        self._calls, self.replicas = calls, replicas

    def takes(self, own: Tensor) -> bool:
        return self._of(own) is not None

    def join(self, own: Tensor) -> Tensor:
        call = self._of(own)
        return pool([own], self.replicas) if call is None else call.all

    def seen(self, call: Call) -> None:
        pass

    def _of(self, own: Tensor) -> Call | None:
        return next((call for call in self._calls if torch.equal(call.own, own.detach())), None)


def joined(layer: Layer, replicas: Reducer | None) -> Reducer | None:
    """What merges this layer's statistics where it is called for a part of a batch; otherwise the replicas."""
    if torch.compiler.is_compiling():
        return replicas
    if thread.part is not None:
        return _Meeting(thread.part, layer, replicas)
    if _calls and recomputing():
        calls = _calls.get(owner_of(layer))
        if calls:
            return _Recalled(list(calls), replicas)
    return replicas


def in_one_batch() -> bool:
    """Whether this is the forward of a part, or may be one that runs again."""
    return not torch.compiler.is_compiling() and (thread.part is not None or bool(_calls))


def moves_here() -> bool:
    """Whether the statistics move in this call: with the last part, when all have read what was before."""
    return thread.part is None or thread.part.is_last


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not checkpoint.CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _refuse_torchs(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001 (torch's signature)
    """A forward pre-hook: a batch norm that does not wait for the other parts would normalize each by itself, without a word."""
    if (
        thread.part is not None
        and isinstance(module, _BatchNorm)
        and module.training
        and not hasattr(module, "statistics")
    ):
        raise StateError(
            f"the parts of one batch meet in batch norms of this library, but {type(module).__name__}({module.num_features}) is "
            "torch's; pass the model through batchnorm.convert"
        )
