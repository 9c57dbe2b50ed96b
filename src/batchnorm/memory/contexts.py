"""Less memory for training: what a batch norm put out is not kept for the backward of the next layer, but computed again there.

In-Place ABN (Rota Bulò, Porzi & Kontschieder 2018, arXiv:1712.02616) keeps the output and inverts the activation to get back to the
input. Here it is the other way around: the input is kept, as every batch norm does, and the output is computed again from it, so
nothing is inverted, and every activation will do.

    x ─batch norm─▶ y ─activation, add─▶ z ─▶ next layer
    └─ kept        └─── recipes ───┘        saves z for its backward: gets z's recipe instead

While a `Saver` is active, every torch function runs under it (a `TorchFunctionMode`), with saved-tensor hooks for just this call:

1. a batch norm whose x is kept for its backward anyway registers a `Recipe` for its output's storage;
2. an elementwise function of `saver.ELEMENTWISE`, or an addition, of tensors that have a recipe or are kept anyway extends the recipe;
3. what a function saves for its backward becomes a `Reference`: to the recipe where the storage has one, else to the tensor itself.

In the backward a recipe is carried out when the first reference to it is opened, by the very calls the forward made, so that gradients
are equal to the last bit. Its result stays until all references to it were opened, or the backward ends.

Hooks are on torch's stack only during a call: between calls there is nothing that would refuse `torch.func`, and nothing is left behind.
Where somebody else's hooks are active (non-reentrant checkpoints, `save_on_cpu`), theirs decide, and nothing is done here.
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
        if func is Tensor.backward:  # what it calls may record, as reentrant checkpoints do
            with self:
                return _backward(*args, **kwargs)
        if getattr(func, "__name__", None) == "__get__" or _steps_aside():
            return func(*args, **kwargs)
        return self._saver.call(func, args, kwargs)


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`Tensor.backward`, which would call the mode again."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _steps_aside() -> bool:
    """Whether nothing is saved, or others see to it."""
    return (
        not torch.is_grad_enabled()
        or differentiated_by_torch()
        or saved_tensors_hooks() is not None
        or torch.jit.is_tracing()
    )


class _Thread(threading.local):
    """What is open in this thread."""

    saver: Saver | None = None
    mode: _Mode | None = None
    depth: int = 0


_thread = _Thread()


@contextmanager
def save_memory() -> Iterator[None]:
    """A context for the forward of training, in which outputs of batch norms are computed again in the backward instead of kept.

    Gradients are the same to the last bit. Spared are the outputs of this library's batch norms, of activations after them and of
    sums of those, as far as a next layer would keep them; the price is one more pass of normalization in the backward. It works
    with any model, on the thread that opened it; contexts can be nested, and it can be used as a decorator. In code that
    `torch.compile` compiles it does nothing: the compiler decides itself what to compute again.

    Source: the aim is that of In-Place ABN (Rota Bulò et al. 2018, arXiv:1712.02616, section 3); the way there is another.
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
    if _thread.saver is None:
        saver = Saver()
        mode = _Mode(saver)
        mode.__enter__()
        _thread.saver, _thread.mode = saver, mode
    _thread.depth += 1
    _thread.saver.everywhere += everywhere


def _close(everywhere: bool) -> None:
    saver, mode = _thread.saver, _thread.mode
    if saver is None or mode is None:
        return
    saver.everywhere -= everywhere
    _thread.depth -= 1
    if _thread.depth == 0:
        _thread.saver = _thread.mode = None
        mode.__exit__(None, None, None)
        saver.clear()


def open_for_model(model: nn.Module, args: Any) -> None:  # noqa: ARG001 (torch's signature)
    """A forward pre-hook: from here on, layers with `save_memory` set save memory."""
    if not torch.compiler.is_compiling():
        _open(everywhere=False)


def close_for_model(model: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (torch's signature)
    """The forward hook that goes with `open_for_model`; torch calls it after an exception too, but not after an interrupt."""
    if not torch.compiler.is_compiling():
        _close(everywhere=False)


def attach(model: nn.Module) -> None:
    """Let a model save memory whenever it is called."""
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
    """Call an autograd function, which no torch function mode sees, as `Saver.call` calls a torch function."""
    saver = None if torch.compiler.is_compiling() else _thread.saver
    if saver is None or _steps_aside() or is_foreign(args[0]):
        return function(*args)
    with disabled_torch_function(), saver.hooks():
        return function(*args)


def saving() -> bool:
    """Whether memory is saved in this thread now, and nobody else's hooks decide."""
    return _thread.saver is not None and not _steps_aside()


def recording() -> Saver | None:
    """Who would take a recipe for what is computed now."""
    saver = None if torch.compiler.is_compiling() else _thread.saver
    return saver if saver is not None and saver.recording else None


def passes_over(wanted: bool) -> bool:
    """Whether memory is saved now, but not in a layer that says this."""
    saver = None if wanted or torch.compiler.is_compiling() else _thread.saver
    return saver is not None and not saver.everywhere


@contextmanager
def passing_over() -> Iterator[None]:
    """Let what is computed in this context be kept."""
    saver = _thread.saver
    assert saver is not None
    before, saver.wanted = saver.wanted, False
    try:
        yield
    finally:
        saver.wanted = before
