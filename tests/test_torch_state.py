"""The private names of torch stand in one file, and say what they did when they were taken."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import batchnorm
from batchnorm import torch_state
from batchnorm.functional import recompute

ROOT = Path(batchnorm.__file__).parent
PRIVATE = re.compile(r"torch\._(?!_)|from torch\._|forward_ad\._|_execution_engine|\._dynamo_")
ELSEWHERE = {"bench/providers.py"}  # patches functorch's configuration for one measurement


def test_they_stand_in_one_file():
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"torch_state.py", *ELSEWHERE}


def test_transforms():
    x = torch.ones(3)
    assert not torch_state.differentiated_by_torch()

    def gradient(x):
        assert torch_state.transforms_active()
        assert torch_state.differentiated_by_torch()
        assert torch_state.only_gradient_levels()
        assert torch_state.tracks_gradient(x)
        with torch_state.outside_transforms():
            assert not torch_state.transforms_active()
        assert not torch_state.tracks_gradient(torch_state.unwrapped(x))
        return x.sum()

    def mapped(x):
        assert torch_state.is_batched(x)
        assert not torch_state.only_gradient_levels()
        return x + 1

    def functional(x):
        assert torch_state.is_functional(x)
        return x + 1

    assert torch.equal(torch.func.grad(gradient)(x), torch.ones(3))
    torch.vmap(mapped)(x)
    torch.func.functionalize(functional)(x)
    assert torch_state.tangent_level() == -1
    with forward_ad.dual_level():
        assert torch_state.tangent_level() == 0
        assert torch_state.differentiated_by_torch()
        assert not torch_state.transforms_active()


def test_norms_of_many_tensors():
    values = [torch.tensor([3.0, 4.0]), torch.tensor([[5.0, 12.0]], dtype=torch.float64), torch.zeros(())]
    assert [norm.item() for norm in torch_state.norms(values)] == [5, 13, 0]


def test_a_batch_of_gradients_is_a_legacy_one():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(torch_state.is_legacy_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    assert seen == [True]


def test_kernels_of_the_dispatcher():
    assert torch_state.has_kernel("aten::native_batch_norm", "CPU")
    assert not torch_state.has_kernel("aten::miopen_batch_norm", "CPU")


def test_backward():
    assert torch_state.graph_task() == -1
    x, ended = torch.ones(3, requires_grad=True), []

    def hook(_):
        assert torch_state.graph_task() != -1
        torch_state.queue_callback(lambda: ended.append(True))
        assert not ended

    y = x * 2
    y.register_hook(hook)
    y.sum().backward()
    assert ended == [True]


def test_a_direct_backward_has_no_frame_before_it():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            assert ctx.saved_tensors[0] is x
            callers.add(sys._getframe(1).f_code.co_filename)
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    found = []
    for decorated in (lambda function: function, torch_state.with_direct_backward):
        function, callers = decorated(Double), set[str]()
        (dx,) = torch.autograd.grad(function.apply(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
        assert dx.tolist() == second.tolist() == [8.0] * 3
        found.append(torch.autograd.function.__file__ in callers)
    assert found == [True, False]


def test_hooks_of_saved_tensors():
    assert torch_state.saved_tensors_hooks() is None
    pack, unpack = (lambda x: x), (lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert torch_state.saved_tensors_hooks()[:2] == (pack, unpack)
        assert torch_state.saved_tensors_hooks(while_tracing=True)[:2] == (pack, unpack)


def test_what_selective_checkpoints_do_not_see():
    seen = []

    def policy(_context, operator, *_arguments, **_named):
        seen.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def block(x):
        with torch_state.unseen_by_checkpoints():
            x.detach().sin()
        recompute.recomputing_now(x.detach())
        return x.exp().exp()

    x = torch.ones(3, requires_grad=True)
    context = partial(create_selective_checkpoint_contexts, policy)
    checkpoint(block, x, use_reentrant=False, context_fn=context).sum().backward()
    assert set(seen) == {"aten.exp.default"}


def test_other_modes_see_everything():
    with FlopCounterMode(display=False) as counter, torch_state.unseen_by_checkpoints():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.get_total_flops() == 16


def test_recorded_linear_layers():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for layer, given in ((torch.nn.Conv2d(4, 6, 3, 2), x), (torch.nn.Linear(4, 6), x[:, :, 0, 0])):
        found = torch_state.recorded_linear(layer(given))
        assert found.bias is layer.bias
        if found.options is None:
            torch.testing.assert_close(found.input @ found.weight + found.bias, layer(given))
        else:
            assert (found.input, found.weight) == (x, layer.weight)
            torch.testing.assert_close(torch.convolution(x, found.weight, found.bias, *found.options), layer(given))
    assert "AddBackward0" in torch_state.recorded_linear(x + 1)


def test_functions_of_torch_that_nobody_overrides():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    with Mode(), torch_state.disabled_torch_function():
        torch.ones(3) + 1


@pytest.mark.parametrize("public", [True, False])
def test_marks_for_the_compiler_are_those_it_sets_itself(public):
    tensor, function = torch.ones(3), lambda: 1
    if public:
        torch._dynamo.mark_static_address(tensor)
        torch.compiler.assume_constant_result(function)
        assert torch_state.compiler_is_loaded()
    else:
        torch_state.static_address(tensor)
        torch_state.constant_while_compiling(function)
    assert function._dynamo_marked_constant is True
    assert tensor._dynamo_static_input_type in ("unguarded", "guarded")


def told():
    return _told[-1]


_told = [1]


@torch_state.constant_while_compiling
def told_while_compiled():
    return told() if torch_state.checked_by_compiled_code(told) else None


def test_compiled_code_checks_a_function():
    """It is compiled again when the function returns something else."""

    @torch.compile(backend="eager")
    def function(x):
        return x + told_while_compiled()

    found = []
    for value in (1, 2, 1):
        _told.append(value)
        found.append(function(torch.zeros(())).item())
    assert found == [1, 2, 1]
    assert not torch_state.checked_by_compiled_code(told)  # nothing is compiled


class Remembering(torch.nn.Module):
    def forward(self, x):
        return x + self.memory.sum()


def test_static_layers():
    """Compiled code is made for the shapes of their tensors; for other modules it may be made for all shapes."""

    class ByTorch(Remembering):
        pass

    @torch_state.static_while_compiling
    class ByUs(Remembering):
        pass

    class Elsewhere(ByUs):
        pass

    torch._dynamo.mark_static(ByTorch)
    Elsewhere.__module__ = "elsewhere"
    assert [_graphs(cls()) for cls in (ByTorch, ByUs, Elsewhere, Remembering)] == [5, 5, 2, 2]


def test_layers_are_static_and_subclasses_are_not():
    class Subclass(batchnorm.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + self.memory.sum()

    assert [_graphs(module(4)) for module in (batchnorm.BatchNorm1d, Subclass)] == [1, 2]
    assert batchnorm.BatchNorm1d._dynamo_marked_static
    assert not hasattr(torch.nn.BatchNorm1d, "_dynamo_marked_static")


def _graphs(module):
    """How many graphs five calls of a module compile that has a tensor of another size each time."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counting)
    for call in range(5):
        module.memory = torch.ones(call + 2)
        compiled(torch.ones(3, 4))
    return len(graphs)


def test_fake_tensors():
    with FakeTensorMode():
        assert torch_state.is_fake(torch.ones(3))
    assert not torch_state.is_fake(torch.ones(3))
