"""Statistics of one batch from micro-batches that are forwarded one by one.

The forward of each micro-batch runs in its own thread until the next batch norm. There it waits until all micro-batches have arrived and
their merged moments are known. Only one thread runs at a time: the threads serve as coroutines, and results are deterministic.
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
from batchnorm.torch_state import unseen_by_checkpoints

Input = TypeVar("Input")
Output = TypeVar("Output")


def as_one_batch(forward: Callable[[Input], Output], parts: Iterable[Input]) -> list[Output]:
    """Forward micro-batches one by one, normalized by the statistics of all of them together, as one batch.

    Outputs and gradients are those of the one batch, up to rounding; so are the running statistics, which are updated once. The
    micro-batches need not fit into one tensor: images of several sizes, sequences of several lengths, models that branch on the data.

        losses = bn.as_one_batch(lambda batch: criterion(model(batch.images), batch.labels), micro_batches)
        torch.stack(losses).mean().backward()

    Each batch norm waits until all micro-batches have reached it, in the forward and in the backward. So the activations of all
    micro-batches are in memory until the backward, as those of the one batch would be, and the same remedy helps: non-reentrant
    checkpoints of the model's blocks (`torch.utils.checkpoint`), which save only the inputs of the blocks and run each block again.

    `Ghost` takes its groups within each micro-batch, `Renorm` corrects the one batch, `MovingAverage` raises. Synchronized layers merge
    all micro-batches of all replicas. `forward` runs in other threads, with the caller's grad mode, autocast, device, and this
    library's `domain`, `accumulate` and `recomputation`; enter other contexts, such as `save_memory`, inside `forward`.

    Args:
        forward: called with each micro-batch; must call the same batch norms in the same order each time.
        parts: the micro-batches, at least one.

    Returns:
        The results of `forward`, one for each micro-batch.

    Raises:
        InputError: if there is no micro-batch.
        StateError: if micro-batches call different batch norms; from a batch norm of torch in training (`bn.convert` the model); in a
            reentrant checkpoint, under a `torch.func` transform, and in compiled code; compiled models run uncompiled.
        RuntimeError: from torch, if the backward is differentiated.
    """
    if torch.compiler.is_compiling():
        raise StateError("micro-batches wait for each other, which compiled code cannot; call as_one_batch uncompiled")
    batches = list(parts)
    if not batches:
        raise InputError("as_one_batch needs at least one micro-batch, but got none")
    if len(batches) == 1:
        return [forward(batches[0])]
    inherited = _Inherited()
    running = [_MicroBatch(number, forward, batch, inherited) for number, batch in enumerate(batches)]
    running[-1].is_last = True
    pooled: Tensor | None = None
    watch = register_module_forward_pre_hook(_refuse_torchs)
    try:
        with eager():
            while True:
                for one in running:
                    one.resume(pooled)
                arrivals = [one.arrival for one in running]
                if all(arrival is None for arrival in arrivals):
                    return [one.output for one in running]
                pooled = _pooled(arrivals)
    finally:
        watch.remove()
        for one in running:
            one.abandon()


class _Arrival(NamedTuple):
    """A micro-batch that waits at a batch norm."""

    layer: Layer
    replicas: Reducer | None
    own: Tensor  # the moments of the micro-batch, as a row

    def __str__(self) -> str:
        layer = owner_of(self.layer)
        return f"{type(layer).__name__}({getattr(layer, 'num_features', '')})"


def _pooled(arrivals: list[_Arrival | None]) -> Tensor:
    first = arrivals[0]
    for number, arrival in enumerate(arrivals):
        if arrival is None or first is None or owner_of(arrival.layer) is not owner_of(first.layer):
            raise StateError(
                "all micro-batches must call the same batch norms in the same order, but micro-batch "
                f"{number} {'had ended' if arrival is None else f'was at {arrival}'} while micro-batch 0 "
                f"{'had ended' if first is None else f'was at {first}'}; run the same layers for each"
            )
    assert first is not None
    return pool([arrival.own for arrival in arrivals if arrival is not None], first.replicas)


class _Abandoned(BaseException):
    """Ends the thread of a micro-batch after another one has failed."""


class _MicroBatch:
    """The forward of a micro-batch as a coroutine: `resume` runs it to its next batch norm, or to its end."""

    def __init__(self, number: int, forward: Callable[[Any], Any], input: Any, inherited: _Inherited) -> None:
        self.is_last = False
        self.arrival: _Arrival | None = None
        self.output: Any = None
        self.wants_grad = torch.is_grad_enabled()
        self._pooled: Tensor | None = None
        self._error: BaseException | None = None
        self._begun = self._ended = self._abandoned = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._run, args=(forward, input, inherited), name=f"micro-batch {number}", daemon=True
        )

    def resume(self, pooled: Tensor | None) -> None:
        """Continue, with the moments of all micro-batches at the batch norm where this one waits."""
        if self._ended:  # the others have not: `_pooled` raises then
            return
        self._pooled = pooled
        if self._begun:
            self._turn.release()
        else:
            self._begun = True
            self._thread.start()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, arrival: _Arrival) -> Tensor:
        """Wait for the other micro-batches and return the moments of all; called in the thread of this one."""
        if not self._abandoned:
            self.arrival = arrival
            self._back.release()
            self._turn.acquire()
        if self._abandoned:
            raise _Abandoned
        self.arrival = None
        assert self._pooled is not None
        return self._pooled

    def abandon(self) -> None:
        """End the thread wherever it is."""
        self._abandoned = True
        if self._begun:
            self._turn.release()
            self._thread.join()

    def _run(self, forward: Callable[[Any], Any], input: Any, inherited: _Inherited) -> None:
        thread.micro_batch = self
        try:
            with inherited.contexts():
                self.output = forward(input)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error  # raised again in the calling thread
        finally:
            self._ended = True
            self._back.release()


class _Inherited:
    """Thread-local state of torch and this library, copied from the calling thread to those of the micro-batches."""

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


# For each layer, the calls whose graph is alive: a checkpoint may run them again.
calls: WeakKeyDictionary[Any, WeakSet[Call]] = WeakKeyDictionary()


class _Waiting(Joint):
    """The reducer of a layer in the forward of a micro-batch: waits for the moments of the others."""

    def __init__(self, micro_batch: _MicroBatch, layer: Layer, replicas: Reducer | None) -> None:
        self._micro_batch, self._layer, self.replicas = micro_batch, layer, replicas

    def accepts(self, own: Tensor) -> bool:  # noqa: ARG002 (the signature)
        return True

    def join(self, own: Tensor) -> Tensor:
        if self._micro_batch.wants_grad and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise StateError(
                "a reentrant checkpoint runs the micro-batches again one by one, so their statistics cannot be merged; pass "
                "use_reentrant=False to torch.utils.checkpoint"
            )
        return self._micro_batch.wait(_Arrival(self._layer, self.replicas, own))

    def record(self, call: Call) -> None:
        if may_be_recomputed():
            calls.setdefault(owner_of(self._layer), WeakSet()).add(call)


class _Recomputing(Joint):
    """The reducer of a layer in the recomputation of a micro-batch: returns the moments that were merged in the forward."""

    def __init__(self, calls: list[Call], replicas: Reducer | None) -> None:
        self._calls, self.replicas = calls, replicas

    def accepts(self, own: Tensor) -> bool:
        return self._of(own) is not None

    def join(self, own: Tensor) -> Tensor:
        call = self._of(own)
        return pool([own], self.replicas) if call is None else call.all

    def record(self, call: Call) -> None:
        pass

    def _of(self, own: Tensor) -> Call | None:
        with unseen_by_checkpoints():
            return next((call for call in self._calls if torch.equal(call.own, own.detach())), None)


def joint_reducer(layer: Layer, replicas: Reducer | None) -> Reducer | None:
    """The reducer that merges the layer's statistics over micro-batches and replicas; `replicas` outside of `as_one_batch`."""
    if torch.compiler.is_compiling():
        return replicas
    if thread.micro_batch is not None:
        return _Waiting(thread.micro_batch, layer, replicas)
    if calls and recomputing():
        of_layer = calls.get(owner_of(layer))
        if of_layer:
            return _Recomputing(list(of_layer), replicas)
    return replicas


def in_one_batch() -> bool:
    """Whether this is the forward of a micro-batch, or may be its recomputation."""
    return thread.micro_batch is not None or (not torch.compiler.is_compiling() and bool(calls))


def updates_here() -> bool:
    """Whether this call updates the running statistics: that of the last micro-batch does, after all have read the old values."""
    return thread.micro_batch is None or thread.micro_batch.is_last


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not checkpoint.CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _refuse_torchs(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001 (torch's signature)
    """A forward pre-hook that raises on torch's batch norms, which would silently normalize each micro-batch by its own statistics."""
    if (
        thread.micro_batch is not None
        and isinstance(module, _BatchNorm)
        and module.training
        and not hasattr(module, "statistics")
    ):
        raise StateError(
            f"as_one_batch merges statistics in batch norms of this library, but {type(module).__name__}({module.num_features}) is "
            "torch's; pass the model through batchnorm.convert"
        )
