"""Every private name of torch that the package uses, each once.

torch may drop or rename any of them in a release; then this file is where to look. `tests/test_torch_state.py` names the public behavior
that each one stands for. The exceptions are attributes of public objects (`module._forward_hooks`, `tensor._version` ...), which
subclasses and copies of modules have to know anyway, and what one experiment of the bench patches.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd as _autograd_in_c  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._C import _functorch as _functorch_in_c  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._C._functorch import TransformType  # pyright: ignore[reportMissingImports] (a C module)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Variable, forward_ad

__all__ = [
    "compiler_is_loaded",
    "constant_while_compiling",
    "differentiated_by_torch",
    "disabled_torch_function",
    "graph_task",
    "is_batched",
    "is_fake",
    "is_functional",
    "is_legacy_batched",
    "is_tracing",
    "norms",
    "only_gradient_levels",
    "outside_transforms",
    "queue_callback",
    "saved_tensors_hooks",
    "static_address",
    "tangent_level",
    "tracks_gradient",
    "transforms_active",
    "unwrapped",
]

# Whether a transform of `torch.func` (grad, vjp, jvp, vmap, functionalize) is active.
transforms_active = torch._C._are_functorch_transforms_active

# Whether `torch.jit.trace` runs.
is_tracing = torch._C._is_tracing

# The norms of many tensors in one call, 0-d each.
norms = torch._foreach_norm

# The id of the backward that runs in this thread; -1 outside of one.
graph_task = torch._C._current_graph_task_id

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


@constant_while_compiling
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch 2.11 takes for True in all code that it compiles."""
    return torch.compiler.is_exporting()
