"""Less memory for training: what a batch norm put out is not kept for the backward of the next layer, but computed again there.

In-Place ABN (Rota Bulò, Porzi & Kontschieder 2018, arXiv:1712.02616) keeps the output and inverts the activation to get back to the
input. Here it is the other way around: the input is kept, as every batch norm does, and the output is computed again from it, so
nothing is inverted, and every activation will do.

    x ─batch norm─▶ y ─activation, add─▶ z ─▶ next layer
    └─ kept        └─── recipes ───┘        saves z for its backward: gets z's recipe instead

While a `Saver` is active, every torch function runs under it (a `TorchFunctionMode`), with saved-tensor hooks for just this call:

1. a batch norm whose x is kept for its backward anyway registers a `Recipe` for its output's storage;
2. an elementwise function of `_PURE`, or an addition, of tensors that have a recipe or are kept anyway extends the recipe;
3. what a function saves for its backward becomes a `Reference`: to the recipe where the storage has one, else to the tensor itself.

In the backward a recipe is carried out when the first reference to it is opened, by the very calls the forward made, so that gradients
are equal to the last bit. Its result stays until all references to it were opened, or the backward ends.

Hooks are on torch's stack only during a call: between calls there is nothing that would refuse `torch.func`, and nothing is left behind.
Where somebody else's hooks are active (non-reentrant checkpoints, `save_on_cpu`), theirs decide, and nothing is done here.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _autograd as autograd_in_c  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.overrides import TorchFunctionMode

from batchnorm.errors import StateError

DEPTH = 16  # steps from what is kept to what is computed again; one tensor for each block passed lies in between for a while

_ADD = (torch.add, Tensor.add, Tensor.add_)
_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
# Elementwise functions of one tensor, by the function that computes the same out of place; `inplace` is their last parameter or none.
_PURE: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(_RELU, torch.relu),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid), torch.sigmoid),
    **dict.fromkeys((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh), torch.tanh),
    F.gelu: F.gelu,
}
_WITH_INPLACE = {F.relu: 1, F.relu6: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1, F.leaky_relu: 2,
                 F.elu: 2, F.celu: 2, F.selu: 1, F.hardtanh: 3}  # fmt: skip


class Kept:
    """A tensor that stays as it is, and the version it had: where torch's own check does not reach."""

    __slots__ = ("__weakref__", "tensor", "version")
    depth = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version  # an alias outside the graph: no cycle

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            StateError: if it was modified in place since.
        """
        if self.tensor._version != self.version:
            raise StateError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; expected version "
                f"{self.version} instead. Under batchnorm.save_memory a batch norm's input is needed for its output too; "
                "modify a clone"
            )
        return self.tensor


class Recipe:
    """How to compute a tensor again: a function and its inputs, which are kept or have a recipe themselves.

    Attributes:
        depth: steps to what is kept.
        references: those that stand in for the tensor in somebody's backward.
    """

    __slots__ = (
        "__weakref__",
        "_function",
        "_inputs",
        "_lock",
        "_result",
        "_stride",
        "_waiting",
        "depth",
        "references",
    )

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Reference | None, ...], stride: tuple[int, ...]
    ) -> None:
        self._function, self._inputs, self._stride = function, inputs, stride
        self.depth = 1 + max(reference.source.depth for reference in inputs if reference is not None)
        self.references: weakref.WeakSet[Reference] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[Reference] = weakref.WeakSet()
        self._result: Tensor | None = None
        self._lock = threading.RLock()

    def value(self, reference: Reference | None = None) -> Tensor:
        """The tensor, computed again unless it still lies here; it stays for the references that have not asked yet.

        Raises:
            StateError: if something it is computed from was modified in place.
        """
        with self._lock:
            result = self._result
            if result is None:
                result = self._compute()
                self._waiting = weakref.WeakSet(self.references)
            if reference is not None:
                self._waiting.discard(reference)
            if not self._waiting:
                self._result = None
            elif (
                self._result is None and torch._C._current_graph_task_id() != -1
            ):  # during a backward, which has an end
                self._result = result
                Variable._execution_engine.queue_callback(functools.partial(_forget, weakref.ref(self)))
            return result

    def _compute(self) -> Tensor:
        result = self._function(*(None if given is None else given.value() for given in self._inputs))
        if result.stride() == self._stride:
            return result
        # In place the strides were those of the first input; out of place torch chooses.
        return result.new_empty_strided(result.shape, self._stride).copy_(result)

    def forget(self) -> None:
        """Free the result, whoever may still ask for it."""
        with self._lock:
            self._result = None


def _forget(recipe: weakref.ref[Recipe]) -> None:
    found = recipe()
    if found is not None:
        found.forget()


class Reference:
    """A tensor by where it comes from, and its place there: what autograd keeps in the tensor's stead.

    Attributes:
        source: what holds the values, or tells how to compute them.
        place: size, strides and offset of a view into the source; None for the whole of it.
    """

    __slots__ = ("__weakref__", "place", "source")

    def __init__(self, source: Kept | Recipe, place: Place | None) -> None:
        self.source, self.place = source, place

    def stand_in(self, other: Reference) -> None:
        """Refer to what the other, a reference to a recipe, refers to."""
        self.source, self.place = other.source, other.place
        if isinstance(self.source, Recipe):
            self.source.references.add(self)

    def value(self) -> Tensor:
        """The tensor, as an input of a recipe."""
        return self._seen(self.source.value())

    def open(self) -> Tensor:
        """The tensor, for the backward that saved it.

        Raises:
            StateError: if something it needs was modified in place.
        """
        if isinstance(self.source, Kept):
            return self.source.value()
        with _as_in_forward():
            return self._seen(self.source.value(self))

    def _seen(self, tensor: Tensor) -> Tensor:
        return tensor if self.place is None else tensor.as_strided(*self.place)


class Place(NamedTuple):
    """Where a tensor lies in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Entry(NamedTuple):
    """A storage whose values have a recipe.

    Attributes:
        recipe: for them.
        version: when they were those of the recipe.
        dtype, place: of the tensor the recipe computes.
        alive: while that tensor lives; its death ends the entry.
        storage: keeps the address from being given to another storage.
    """

    recipe: Recipe
    version: int
    dtype: torch.dtype
    place: Place
    alive: weakref.ref[Tensor]
    storage: StorageWeakRef


class Saver:
    """What one thread knows of its tensors while it saves memory.

    Attributes:
        everywhere: how many of the contexts that are open were opened by `save_memory`, for all layers, rather than by a model.
        wanted: whether the layer that is computed now takes part.
        recording: whether a call runs whose tensors are looked at.
    """

    def __init__(self) -> None:
        self.everywhere, self.wanted, self.recording = 0, True, False
        self._entries: dict[int, _Entry] = {}  # by storage
        self._kept: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()  # by storage
        self._packed: list[tuple[int, Reference]] = []  # in the call that runs, of storages without a recipe

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function; of what it saves the recipe is kept, where there is one."""
        step = self._step(function, args, kwargs)
        with self.hooks():
            result = function(*args, **kwargs)
            if step is not None and type(result) is Tensor and result.dtype is args[0].dtype:  # autocast may change it
                self._extend(result, *step)
        return result

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Saved-tensor hooks for one call."""
        self.recording, self._packed = True, []
        try:
            with saved_tensors_hooks(self._pack, Reference.open):
                yield
        finally:
            for key, reference in self._packed:
                if isinstance(reference.source, Kept):
                    self._kept[key] = reference.source
            self.recording, self._packed = False, []

    def remember(
        self,
        output: Tensor,
        function: Callable[..., Tensor],
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Give a batch norm's output a recipe: the function of x and mask, which are kept in any case, and of the residual.

        Nothing happens where the residual is in nobody else's keeping: the recipe would keep as much as it spares.
        """
        if not self.wanted or any(_is_foreign(value) for value in (output, x, residual, mask) if value is not None):
            return
        free = None if residual is None else self._free(residual)
        if residual is not None and free is None:
            return
        kept = (None if value is None else self._free(value) or Reference(Kept(value), None) for value in (x, mask))
        self._register(output, function, (next(kept), free, next(kept)))

    def clear(self) -> None:
        """Forget all tensors."""
        self._entries.clear()

    def _pack(self, tensor: Tensor) -> Reference:
        if _is_foreign(tensor):
            return Reference(Kept(tensor), None)
        key, entry = _key(tensor), self._entry(tensor)
        reference = Reference(Kept(tensor), None) if entry is None else _reference_to(entry, tensor)
        if isinstance(reference.source, Kept):
            self._packed.append((key, reference))
        else:
            reference.source.references.add(reference)
        return reference

    def _entry(self, tensor: Tensor) -> _Entry | None:
        """Of the tensor's storage, where it still holds what the recipe computes."""
        entry = self._entries.get(_key(tensor))
        known = entry is not None and entry.version == tensor._version and entry.dtype is tensor.dtype
        return entry if known and not tensor.is_neg() else None

    def _free(self, tensor: Tensor) -> Reference | None:
        """A reference to a tensor that costs no memory, since it has a recipe or is kept anyway; None where it would."""
        entry = self._entry(tensor)
        if entry is not None:
            return _reference_to(entry, tensor)
        kept = self._kept.get(_key(tensor))
        return None if kept is None or kept.version != tensor._version else Reference(Kept(tensor), None)

    def _step(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Tensor], tuple[Reference, ...]] | None:
        """A function that computes the same out of place, and its inputs, where the result shall have a recipe."""
        if not self._entries or not args or _is_foreign(args[0]):
            return None
        if function in _ADD:
            plain = len(args) == 2 and not kwargs and not _is_foreign(args[1])
            return self._addition(*args, inplace=function is Tensor.add_) if plain else None
        pure, inplace_at = _PURE.get(function), _WITH_INPLACE.get(function)
        entry = None if pure is None and inplace_at is None else self._entry(args[0])
        if entry is None:
            return None
        rest = args[1:] if inplace_at is None else args[1:inplace_at]
        options = {name: value for name, value in kwargs.items() if name != "inplace"}
        if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
            return None
        return _with(pure or function, rest, options), (_reference_to(entry, args[0]),)

    def _addition(
        self, one: Tensor, other: Tensor, inplace: bool
    ) -> tuple[Callable[..., Tensor], tuple[Reference, ...]] | None:
        if one.shape != other.shape or one.dtype is not other.dtype:
            return None
        if self._entry(one) is None and (inplace or self._entry(other) is None):
            return None
        first, second = self._free(one), self._free(other)
        return None if first is None or second is None else (torch.add, (first, second))

    def _extend(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Reference, ...]) -> None:
        """Give a result its recipe, and what was packed of it on the way."""
        key = _key(result)
        before = self._entries.get(key)
        if before is not None and before.place != _place(result):  # a part of it was modified in place
            return
        self._register(result, function, inputs)
        entry = self._entry(result)
        if entry is None:
            return
        for packed, reference in self._packed:
            if packed == key and isinstance(reference.source, Kept) and reference.source.version == entry.version:
                reference.stand_in(_reference_to(entry, reference.source.tensor))

    def _register(self, tensor: Tensor, function: Callable[..., Tensor], inputs: tuple[Reference | None, ...]) -> None:
        key, place = _key(tensor), _place(tensor)
        recipe = Recipe(function, inputs, place.stride)
        self._entries.pop(key, None)
        if recipe.depth > DEPTH or place.offset:  # kept, then: the next recipes start from it
            return
        alive = weakref.ref(tensor, lambda _: self._entries.pop(key, None))
        storage = StorageWeakRef(tensor.untyped_storage())
        self._entries[key] = _Entry(recipe, tensor._version, tensor.dtype, place, alive, storage)


def _with(function: Callable[..., Tensor], rest: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Tensor]:
    return (lambda value: function(value, *rest, **options)) if rest or options else function


def _is_foreign(value: Any) -> bool:
    """Whether it is no plain tensor in strided memory."""
    return type(value) not in (Tensor, Parameter) or value.layout is not torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> Place:
    return Place(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _reference_to(entry: _Entry, tensor: Tensor) -> Reference:
    """A reference to the entry's recipe for a tensor in its storage."""
    place = _place(tensor)
    return Reference(entry.recipe, None if place == entry.place else place)


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
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or autograd_in_c._top_saved_tensors_default_hooks(False) is not None
        or torch.jit.is_tracing()
    )


@contextmanager
def _as_in_forward() -> Iterator[None]:
    """The circumstances of a recipe, whatever those of the backward are."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch._C._are_functorch_transforms_active():  # a batch of gradients: the recipe's tensors are not batched
            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


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
    """The forward hook that goes with `open_for_model`; torch calls it after an exception too."""
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
    if saver is None or _steps_aside() or _is_foreign(args[0]):
        return function(*args)
    with torch._C.DisableTorchFunction(), saver.hooks():
        return function(*args)


def saving() -> bool:
    """Whether memory is saved now, by this thread."""
    return _thread.saver is not None


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
