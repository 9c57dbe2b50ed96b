"""Every private name of torch that the package uses, each once.

torch may drop or rename any of them in a release; then this file is where to look. `tests/test_torch_state.py` names the public behavior
that each one stands for. The exceptions are attributes of public objects (`module._forward_hooks`, `tensor._version` ...), which
subclasses and copies of modules have to know anyway, and what one experiment of the bench patches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd as _autograd_in_c  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._C import _functorch as _functorch_in_c  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._C._functorch import TransformType  # pyright: ignore[reportMissingImports] (a C module)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Variable, forward_ad
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
)
from torch.utils.checkpoint import SAC_IGNORED_OPS, _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = [
    "RecordedLinear",
    "checked_by_compiled_code",
    "compiler_is_loaded",
    "constant_while_compiling",
    "differentiated_by_torch",
    "disabled_torch_function",
    "graph_task",
    "has_kernel",
    "is_batched",
    "is_fake",
    "is_functional",
    "is_legacy_batched",
    "is_tracing",
    "never_stored_by_checkpoints",
    "norms",
    "only_gradient_levels",
    "outside_transforms",
    "queue_callback",
    "recorded_linear",
    "saved_tensors_hooks",
    "static_address",
    "static_while_compiling",
    "tangent_level",
    "tracks_gradient",
    "transforms_active",
    "unseen_by_checkpoints",
    "unwrapped",
    "with_direct_backward",
]

Function = TypeVar("Function", bound=type[torch.autograd.Function])
Module = TypeVar("Module", bound=type[torch.nn.Module])

# Whether a transform of `torch.func` (grad, vjp, jvp, vmap, functionalize) is active.
transforms_active = torch._C._are_functorch_transforms_active

# Whether `torch.jit.trace` runs.
is_tracing = torch._C._is_tracing

# The norms of many tensors in one call, 0-d each.
norms = torch._foreach_norm

# The id of the backward that runs in this thread; -1 outside of one.
graph_task = torch._C._current_graph_task_id

# Whether an operator has a kernel of its own for a key of torch's dispatcher; takes the names of both.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

# A context in which modes of `torch.overrides` and `__torch_function__` are not called.
disabled_torch_function = torch._C.DisableTorchFunction

# A context in which no transform of `torch.func` is active.
outside_transforms = temporarily_clear_interpreter_stack

# The tensor below one level of `torch.func`, and what kinds of level there are.
unwrapped = _functorch_in_c.get_unwrapped
tracks_gradient = _functorch_in_c.is_gradtrackingtensor
is_batched = _functorch_in_c.is_batchedtensor
is_functional = _functorch_in_c.is_functionaltensor
is_legacy_batched = _functorch_in_c.is_legacy_batchedtensor  # of `is_grads_batched=True`


def unseen_by_checkpoints() -> AbstractContextManager[object]:
    """A context for operators that only the forward calls, or only its recomputation: no selective checkpoint sees them.

    Such a checkpoint (`create_selective_checkpoint_contexts`) takes the n-th call of an operator in the recomputation for the n-th of the
    forward, whose result it may have stored. Where there is one, no other `TorchDispatchMode` sees them either; but what is traced
    must be seen, so under the modes of a tracer nothing is hidden.
    """
    if torch.compiler.is_compiling() or not _len_torch_dispatch_stack():
        return nullcontext()
    modes = _get_current_dispatch_mode_stack()
    selective = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    if not any(isinstance(mode, selective) for mode in modes) or any(mode.is_infra_mode() for mode in modes):
        return nullcontext()
    return _disable_current_modes()


def never_stored_by_checkpoints(operator: Any) -> None:
    """Let selective checkpoints call an operator anew in the recomputation, whatever their policy."""
    SAC_IGNORED_OPS.add(operator)


def tangent_level() -> int:
    """The level of forward-mode differentiation; -1 outside of it."""
    return forward_ad._current_level


def differentiated_by_torch() -> bool:
    """Whether torch differentiates or maps what is called now, so that plain torch operations are needed."""
    return transforms_active() or forward_ad._current_level >= 0


def only_gradient_levels() -> bool:
    """Whether every active transform of `torch.func` is one that differentiates: grad, vjp, jvp."""
    return all(
        level.key() in (TransformType.Grad, TransformType.Jvp) for level in retrieve_all_functorch_interpreters()
    )


def saved_tensors_hooks(*, while_tracing: bool = False) -> Any:
    """The innermost `saved_tensors_hooks` of this thread, or None; a compiler's own only if asked for."""
    return _autograd_in_c._top_saved_tensors_default_hooks(while_tracing)


def queue_callback(callback: Any) -> None:
    """Call this when the backward that runs now ends."""
    Variable._execution_engine.queue_callback(callback)


def with_direct_backward(function: Function) -> Function:
    """Decorate a `torch.autograd.Function`: autograd calls its backward without the frames in which torch looks for other forms of it."""
    cls: Any = function
    cls._backward_cls.apply = cls.backward
    return function


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled in this process: loading the compiler takes seconds, so nothing here does."""
    return "torch._dynamo" in sys.modules


def static_address(tensor: Tensor) -> None:
    """`torch._dynamo.mark_static_address` without loading the compiler. CUDA graphs reject code that writes other tensors."""
    tensor._dynamo_static_input_type = "unguarded"  # pyright: ignore[reportAttributeAccessIssue]


def constant_while_compiling(function: Any) -> Any:
    """`torch.compiler.assume_constant_result` without loading the compiler."""
    function._dynamo_marked_constant = True
    return function


def checked_by_compiled_code(function: Callable[[], object]) -> bool:
    """Make the code that is compiled now check before each call that a module's function still returns what it returns now.

    Compiled code checks so for functions of torch, such as `torch.cuda.current_device`. It must be called in a function that is
    `constant_while_compiling`. False if nothing is compiled, or this torch does not have it.
    """
    if not compiler_is_loaded():
        return False
    try:
        from torch._dynamo.guards import GuardBuilder, install_guard
        from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource
        from torch._dynamo.symbolic_convert import InstructionTranslator

        module = InstructionTranslator.current_tx().import_source(function.__module__)
        result = CallFunctionNoArgsSource(AttrSource(module, function.__name__))
        install_guard(result.make_guard(GuardBuilder.EQUALS_MATCH))
    except (ImportError, AttributeError):
        return False
    return True


def static_while_compiling(cls: Module) -> Module:
    """`torch._dynamo.mark_static` of a layer's class without loading the compiler, and without what users derive from it.

    Code is compiled for the shapes of the tensors that a static layer has, and does not ask before each call whether two of them, or the
    input, have become the same tensor: as with torch's own layers. A user's class may hold tensors that grow.
    """
    marked: Any = cls
    marked._dynamo_marked_static = _IfFrom(cls.__module__.partition(".")[0])
    return cls


class _IfFrom:
    """An attribute of classes: whether a class is defined in this package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __get__(self, instance: object, owner: type) -> bool:
        return owner.__module__.partition(".")[0] == self._package


@constant_while_compiling
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch 2.11 takes for True in all code that it compiles."""
    return torch.compiler.is_exporting()


@constant_while_compiling
def takes_plain_operations() -> bool:
    """Whether what is traced now is exported, differentiated or mapped by torch."""
    return torch.compiler.is_exporting() or differentiated_by_torch()


class RecordedLinear(NamedTuple):
    """A convolution or a matrix product, as autograd's graph records it.

    Attributes:
        input: (N, inputs, *S).
        weight: (outputs, inputs / groups, *kernel); of a transposed convolution (inputs, outputs / groups, *kernel), of a product
            (inputs, outputs).
        bias: (outputs,), or None.
        options: stride, padding, dilation, transposed, output padding and groups of a convolution; None for a product.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: tuple[Any, ...] | None


def recorded_linear(output: Tensor) -> RecordedLinear | str:
    """The convolution or matrix product whose output this is, or why it is none whose place another node can take.

    Inputs, weight and bias are the tensors of the graph, so gradients flow through them.
    """
    node: Any = output.grad_fn
    if type(output) is not Tensor:
        return f"its input is a {type(output).__name__}"
    if node is None:
        return "its input needs no gradient"
    if output._backward_hooks or output.retains_grad:
        return "its input has hooks, or retains its gradient"
    if output._version:
        return "its input was modified in place"
    try:
        edges = [owner for owner, _ in node.next_functions]
        if node.name() == "ConvolutionBackward0":
            options = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed)
            options = *options, node._saved_output_padding, node._saved_groups
            biased = node._saved_bias_sym_sizes_opt not in (None, (0,))
            of_input, of_weight, of_bias = edges
            x, weight = node._saved_input, node._saved_weight
        elif node.name() == "AddmmBackward0" and node._saved_alpha == node._saved_beta == 1:
            of_bias, of_input, of_weight = edges
            x, weight, biased, options = node._saved_mat1, node._saved_mat2, True, None
        elif node.name() == "MmBackward0":
            of_input, of_weight, of_bias = *edges, None
            x, weight, biased, options = node._saved_self, node._saved_mat2, False, None
        else:
            return f"its input comes from {node.name()}, not from a convolution or linear layer"
    except RuntimeError:  # modified in place, or freed
        return "what its input was computed from is no longer what it was"
    except AttributeError as error:
        return f"this version of torch records the layer before it differently ({error})"
    if x is None or weight is None:
        return "the linear layer before it has frozen weights, or input that needs no gradient"
    if not (_is_from(x, of_input) and _is_from(weight, of_weight)):
        return "what the layer before it saved is held by hooks of saved tensors"
    if output.is_complex() or not (x.dtype is weight.dtype is output.dtype):
        return f"the linear layer before it computes in {weight.dtype}"
    bias = _leaf_of(of_bias, output.dtype) if biased else None
    if biased and (bias is None or bias.shape != output.shape[1:2]):
        return "the bias of the layer before it is frozen or computed"
    return RecordedLinear(x, weight, bias, options)


def _is_from(value: Tensor, node: Any) -> bool:
    """Whether a saved tensor is that of the graph, whose gradient flows into this node."""
    if node is None:
        return not value.requires_grad
    return value.grad_fn is node if value.grad_fn is not None else getattr(node, "variable", None) is value


def _leaf_of(node: Any, dtype: torch.dtype) -> Tensor | None:
    """The leaf that accumulates its gradient in this node, or behind the cast that autocast has made; None if it is neither."""
    if node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    value = getattr(node, "variable", None)
    return None if value is None else value.to(dtype)
