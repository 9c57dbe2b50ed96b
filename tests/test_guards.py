"""What a graph of torch.fx does not hold, and how tracing finds out."""

import threading

import pytest
import torch
from torch import fx

from batchnorm.errors import StateError
from batchnorm.surgery.guards import without_functions


class Reversed(torch.autograd.Function):
    """Its forward returns the stand-in itself: nothing of it shows in the graph."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class ReversedWithContext(torch.autograd.Function):
    """The other way to write one."""

    @staticmethod
    def forward(x):
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Derived(Reversed):
    pass


_apply = Reversed.apply
WAYS = {
    "class": lambda x: Reversed.apply(x),
    "reference": lambda x: _apply(x),
    "setup_context": lambda x: ReversedWithContext.apply(x),
    "subclass": lambda x: Derived.apply(x),
    "in C": lambda x: super(torch.autograd.Function, Reversed).apply(x),
    "constant": lambda x: x * Reversed.apply(torch.ones(1)),
    "gradients off": lambda x: torch.no_grad()(_apply)(x),
}


def trace(function):
    class Model(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return fx.Tracer().trace(Model())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_function_is_refused_while_tracing(way, grad):
    with torch.set_grad_enabled(grad):
        graph = trace(WAYS[way])
        assert "Reversed" not in str(graph)  # the graph alone does not tell
        with without_functions(), pytest.raises(StateError, match=r"calls an autograd\.Function"):
            trace(WAYS[way])
    x = torch.ones(1, requires_grad=True)
    Reversed.apply(x).backward()
    assert x.grad == -1  # and afterwards it works again


def test_the_guard_is_one_thread_s_own_and_nests():
    found = []

    def other():
        x = torch.ones(1, requires_grad=True)
        Reversed.apply(x).backward()
        found.append(x.grad.item())

    with without_functions():
        with without_functions(), pytest.raises(StateError):
            Reversed.apply(torch.ones(1))
        with pytest.raises(StateError):
            Reversed.apply(torch.ones(1))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [-1]
    assert "__init__" not in vars(torch.autograd.function.BackwardCFunction)


def test_the_guard_goes_when_tracing_raises():
    with pytest.raises(ZeroDivisionError), without_functions():
        raise ZeroDivisionError
    assert "__init__" not in vars(torch.autograd.function.BackwardCFunction)
