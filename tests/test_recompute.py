"""Recomputations: a forward that activation checkpointing runs again in the backward updates nothing again, eager or compiled."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm.functional import recompute
from batchnorm.statistics import Batch, Ghost, Mixed, MovingAverage, Renorm, Running


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_move_once_under_checkpoint(reentrant, compiled):
    plain, layer = bn.BatchNorm1d(3, activation="silu"), bn.BatchNorm1d(3, activation="silu")
    x = torch.randn(8, 3)
    plain(x)
    called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    checkpoint(called, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    for wanted, found in zip(plain.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("reentrant", "before", "graphs"), [(False, False, 1), (True, False, 2), (False, True, 1), (True, True, 2)]
)
def test_how_often_a_checkpointed_layer_is_compiled(reentrant, before, graphs, inside):
    """A reentrant checkpoint runs the forward without gradients; code that ran before one is compiled again for the recomputation."""
    compiled = []

    def compiler(graph, _):
        compiled.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    plain, layer = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    called = torch.compile(layer, backend=backend)
    if before:
        plain(x)
        called(x.clone().requires_grad_()).sum().backward()
    compiled.clear()
    run = partial(checkpoint, layer if inside else called, use_reentrant=reentrant)
    run = torch.compile(run, backend=backend) if inside else run
    for _ in range(3):
        plain(x)
        run(x.clone().requires_grad_()).sum().backward()
    assert len(compiled) == (1 if inside else graphs)
    for wanted, found in zip(plain.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_under_compiled_autograd(reentrant):
    torch._dynamo.reset()
    plain, layer = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    called = torch.compile(layer, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def backward(y):
        y.sum().backward()

    x = torch.randn(8, 3)
    with torch._dynamo.config.patch(compiled_autograd=True):
        for _ in range(2):
            plain(x)
            backward(checkpoint(called, x.clone().requires_grad_(), use_reentrant=reentrant))
    for wanted, found in zip(plain.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_compiled_code_goes_by_what_is_said():
    layer = bn.BatchNorm1d(3)
    called, x = torch.compile(layer, backend="aot_eager"), torch.randn(8, 3)
    seen = []
    for said in (None, True, False, True, None):
        with nullcontext() if said is None else bn.recomputation(said):
            called(x)
        seen.append(layer.num_batches_tracked.item())
    assert seen == [1, 1, 2, 2, 3]


def test_whether_it_is_a_recomputation_can_be_said():
    layer = bn.BatchNorm1d(3)
    with bn.recomputation():
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    x = torch.randn(4, 3, requires_grad=True)

    def hook(grad):
        with bn.recomputation(False):
            layer(x.detach())
        return grad

    x.register_hook(hook)
    x.sum().backward()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("ask_now", [recompute.recomputing_now, recompute._recomputing], ids=["operator", "in Python"])
def test_compiled_code_asks_the_same(ask_now):
    """The C++ library answers where it is, Python elsewhere."""
    found, other = [], []

    def ask(answers=found):
        now = ask_now(torch.zeros(3))
        assert (now.shape, now.dtype) == ((), torch.bool)
        assert now.item() is recompute.recomputing()
        answers.append(now.item())

    def hook(grad):
        ask()
        with bn.recomputation(False):
            ask()
        thread = threading.Thread(target=ask, args=(other,))
        thread.start()
        thread.join()
        return grad

    ask()
    with bn.recomputation():
        ask()
        with bn.recomputation(False):
            ask()
        ask()
    ask()
    x = torch.zeros((), requires_grad=True)
    x.register_hook(hook)
    x.backward()
    assert found == [False, True, False, True, False, True, False]
    assert other == [False]


class _Block(nn.Module):
    def __init__(self, source, activation):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(bn.BatchNorm1d(4, statistics=source, activation=activation) for _ in range(2))

    def forward(self, x, **given):
        """With operators beside the norms, of which a checkpoint counts the calls."""
        (first, second), (norm, last) = self.convs, self.norms
        h = norm(first(x).clone().clamp(-9, 9), **given)
        return last(second(h).clone(), residual=h).sum(-1)


def _step(model, x, context, given):
    """The gradients and the buffers after two steps."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = (
            model(x, **given)
            if context is None
            else checkpoint(model, x, use_reentrant=False, context_fn=context, **given)
        )
        y.square().sum().backward()
    return [x.grad, *(value.grad for value in model.parameters()), *model.buffers()]


def _saving(what):
    def policy(_context, operator, *_arguments, **_named):
        return CheckpointPolicy.MUST_SAVE if _SAVED[what](str(operator)) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


_SAVED = {
    "all": lambda _: True,
    "nothing": lambda _: False,
    "convolutions": lambda name: "convolution" in name,
    "norms": lambda name: "batch" in name,
    "all but convolutions": lambda name: "convolution" not in name,
}


@pytest.mark.parametrize("saved", _SAVED)
@pytest.mark.parametrize(
    "source", [Batch(), Running(), Ghost(2), Renorm(), MovingAverage(2, warmup=1), Mixed(0.5)], ids=str
)
@pytest.mark.parametrize("given", ["", "mask", "weights"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_selective_checkpoint_may_save_what_it_likes(saved, source, given, activation):
    """It takes the n-th call of an operator in the recomputation for the n-th in the forward, so they must be the same calls."""
    torch.manual_seed(0)
    model, x = _Block(source, activation), torch.randn(6, 4, 5)
    beside = {"mask": torch.rand(6, 5) < 0.8, "weights": torch.rand(6)}
    beside = {given: beside[given]} if given else {}

    context = _saving(saved)
    wanted = _step(copy.deepcopy(model), x, None, beside)
    torch.testing.assert_close(_step(copy.deepcopy(model), x, context, beside), wanted)
    exact = _step(copy.deepcopy(model).eval(), x, None, beside)
    torch.testing.assert_close(_step(model.eval(), x, context, beside), exact)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_selective_checkpoint_of_a_converted_model(backend):
    torch.manual_seed(0)
    model = bn.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    x = torch.randn(2, 3, 6, 6)
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    wanted, found = copy.deepcopy(model), copy.deepcopy(model)
    run = partial(checkpoint, found, use_reentrant=False, context_fn=context)
    wanted(x).square().sum().backward()
    (torch.compile(run, backend=backend, fullgraph=True) if backend else run)(x).square().sum().backward()
    for one, other in zip(wanted.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    for one, other in zip(wanted.buffers(), found.buffers(), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("saved", _SAVED)
@pytest.mark.parametrize("how", ["as one batch", "accumulated"])
def test_selective_checkpoints_of_micro_batches(saved, how):
    torch.manual_seed(0)
    model, x = _Block(Batch(), None), torch.randn(6, 4, 5)

    def step(model, context):
        parts = [part.clone().requires_grad_() for part in x.split(3)]

        def forward(part):
            return model(part) if context is None else checkpoint(model, part, use_reentrant=False, context_fn=context)

        if how == "accumulated":
            with bn.accumulate(2):
                for part in parts:
                    forward(part).square().sum().backward()
        else:
            sum(y.square().sum() for y in bn.as_one_batch(forward, parts)).backward()
        return [*(part.grad for part in parts), *(value.grad for value in model.parameters()), *model.buffers()]

    wanted = step(copy.deepcopy(model), None)
    torch.testing.assert_close(step(model, _saving(saved)), wanted)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_checkpoint_within_a_selective_one(training):
    torch.manual_seed(0)
    layer, x = bn.BatchNorm1d(4).train(training), torch.randn(6, 4, 5, requires_grad=True)
    layer.running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer.weight)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad(copy.deepcopy(layer)(x).sin().sum(), x)

    def inner(x):
        return checkpoint(layer, x, use_reentrant=False)

    y = checkpoint(inner, x, use_reentrant=False, context_fn=_saving("convolutions"))
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), inputs)[:1], wanted)
    assert layer.num_batches_tracked == training


def test_a_compiled_layer_in_a_selective_checkpoint_that_saves_norms():
    layer, x = bn.BatchNorm1d(4), torch.randn(6, 4, 5, requires_grad=True)
    run = torch.compile(layer, backend="aot_eager")
    checkpoint(run, x, use_reentrant=False, context_fn=_saving("norms")).square().sum().backward()
    assert layer.num_batches_tracked == 1
