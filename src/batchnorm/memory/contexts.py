"""Less memory for training: the output of a batch norm is not saved for the backward of the next layer, but computed again there.

In-Place ABN (Rota Bulò, Porzi & Kontschieder 2018, arXiv:1712.02616) saves the output and inverts the activation to recover the input.
This module does the opposite: it saves the input, as every batch norm does, and computes the output again. So it inverts nothing and
works with every activation.

    x ─batch norm─▶ y ─activation, add─▶ z ─▶ next layer
    └─ saved       └─── recipes ───┘        saves z for its backward: gets z's recipe instead

While a `Saver` is active, a `TorchFunctionMode` runs every torch function through it, with saved-tensor hooks for just this call:

1. A batch norm registers a `Recipe` for the storage of its output. Its input x is saved for its own backward anyway.
2. An elementwise function of `saver.ELEMENTWISE`, or an addition, extends the recipe, if its inputs have recipes or are saved anyway.
3. Each tensor that a function saves for its backward becomes a `Reference`: to the recipe if the storage has one, else to the tensor.

In the backward, the first reference that is opened computes its recipe, by the same calls as the forward, so gradients are equal to the
last bit. The result is held until all references to it were opened, or the backward ends.

Hooks are on torch's stack only during a call, so that between calls they cannot disturb `torch.func`. If other saved-tensor hooks are
active (non-reentrant checkpoints, `save_on_cpu`), they take precedence and this module does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm.memory.saver import Saver, is_foreign
from batchnorm.torch_state import differentiated_by_torch, disabled_torch_function, saved_tensors_hooks


class _Mode(TorchFunctionMode):
    """Sends every torch function through a `Saver`."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if func is Tensor.backward:  # the functions that it calls may save tensors, as reentrant checkpoints do
            with self:
                return _backward(*args, **kwargs)
        if getattr(func, "__name__", None) == "__get__" or _is_inactive():
            return func(*args, **kwargs)
        return self._saver.call(func, args, kwargs)


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`Tensor.backward` without the dispatch to the mode."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _is_inactive() -> bool:
    """Whether nothing is saved for a backward now, or other hooks take precedence."""
    return (
        not torch.is_grad_enabled()
        or differentiated_by_torch()
        or saved_tensors_hooks() is not None
        or torch.jit.is_tracing()
    )


class _Thread(threading.local):
    """The saver of this thread, and how many contexts are open."""

    saver: Saver | None = None
    mode: _Mode | None = None
    depth: int = 0


thread = _Thread()


@contextmanager
def save_memory() -> Iterator[None]:
    """Save memory in training: in this context, outputs of batch norms are not saved, but computed again in the backward.

    Gradients are the same to the last bit. This saves the memory of outputs of this library's batch norms, of activations after them,
    and of sums of these, if the next layer would save them for its backward. It costs one more normalization pass in the backward.
    Use it around the forward of any model. It applies to the current thread, can be nested, and works as a decorator. In code that
    `torch.compile` compiles it does nothing: the compiler itself decides what to compute again.

    Source: the aim is that of In-Place ABN (Rota Bulò et al. 2018, arXiv:1712.02616, section 3); the method differs.
    """
    if torch.compiler.is_compiling():
        yield
        return
    _open(everywhere=True)
    try:
        yield
    finally:
        _close(everywhere=True)


def _open(everywhere: bool) -> None:
    if thread.saver is None:
        saver = Saver()
        mode = _Mode(saver)
        mode.__enter__()
        thread.saver, thread.mode = saver, mode
    thread.depth += 1
    thread.saver.everywhere += everywhere


def _close(everywhere: bool) -> None:
    saver, mode = thread.saver, thread.mode
    if saver is None or mode is None:
        return
    saver.everywhere -= everywhere
    thread.depth -= 1
    if thread.depth == 0:
        thread.saver = thread.mode = None
        mode.__exit__(None, None, None)
        saver.clear()


def open_for_model(model: nn.Module, args: Any) -> None:  # noqa: ARG001 (torch's signature)
    """A forward pre-hook that opens a context for layers whose `save_memory` is True."""
    if not torch.compiler.is_compiling():
        _open(everywhere=False)


def close_for_model(model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (torch's signature)
    """A forward hook that closes the context; torch calls the hook after an exception too, but not after an interrupt."""
    if not torch.compiler.is_compiling():
        _close(everywhere=False)


def attach(model: nn.Module) -> None:
    """Register hooks that make a model save memory in every call."""
    if open_for_model not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(open_for_model, prepend=True)
        model.register_forward_hook(close_for_model, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for hooks, ours in (
        (model._forward_pre_hooks, open_for_model),
        (model._forward_hooks, close_for_model),
    ):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


def recorded(function: Callable[..., Any], *args: Any) -> Any:
    """Call an autograd function as `Saver.call` does, since torch function modes do not intercept autograd functions."""
    saver = None if torch.compiler.is_compiling() else thread.saver
    if saver is None or _is_inactive() or is_foreign(args[0]):
        return function(*args)
    with disabled_torch_function(), saver.hooks():
        return function(*args)


def saving() -> bool:
    """Whether memory is saved in this thread now, and no other hooks take precedence."""
    return thread.saver is not None and not _is_inactive()


def recording() -> Saver | None:
    """The saver that accepts a recipe for the current call, or None."""
    saver = None if torch.compiler.is_compiling() else thread.saver
    return saver if saver is not None and saver.recording else None


def skips() -> bool:
    """Whether memory is saved now, but only for layers whose `save_memory` is True."""
    saver = thread.saver
    return saver is not None and not torch.compiler.is_compiling() and not saver.everywhere


@contextmanager
def skipping() -> Iterator[None]:
    """Save no memory for the batch norm that runs in this context."""
    saver = thread.saver
    assert saver is not None
    before, saver.wanted = saver.wanted, False
    try:
        yield
    finally:
        saver.wanted = before
