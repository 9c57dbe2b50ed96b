"""Task 4: a layer whose statistics are buffers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import reference
from batchnorm.language import marked, tr
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Wrong, agree, judge, normal
from batchnorm.learn.exercises.task import Task

C, EPS, MOMENTUM = 3, 0.1, 0.3
STATISTICS = ("running_mean", "running_var")


def check(learner: Learner) -> None:
    """What the layer stores, what it computes in both modes, and what a copy and a checkpoint hold."""
    layer = learner.run("BatchNorm", C, EPS, MOMENTUM)
    if not isinstance(layer, nn.Module):
        raise Wrong(tr("{name} must be a class derived from nn.Module", name="BatchNorm"))
    with learner.running():
        _check_state(layer)
        layer = layer.double()
        with torch.no_grad():
            for each, seed in zip(layer.parameters(), (1, 2), strict=True):
                each.copy_(normal(seed, C) + 2)
        _check_training(layer)
        _check_evaluation(layer)
        _check_copies(layer, learner)


def _check_state(layer: Any) -> None:
    parameters = dict(layer.named_parameters())
    for name in STATISTICS:
        if not isinstance(getattr(layer, name, None), Tensor):
            raise Wrong(tr("{name} is missing: define it", name=name))
        if name in parameters:
            raise Wrong(tr(why.STATISTICS_ARE_PARAMETERS))
        if name not in layer.state_dict():
            is_buffer = name in dict(layer.named_buffers())
            raise Wrong(tr(why.BUFFERS_NOT_PERSISTENT if is_buffer else why.NO_BUFFERS))
    if not {"gamma", "beta"} <= parameters.keys():
        raise Wrong(tr(why.NO_PARAMETERS))


def _check_training(layer: Any) -> None:
    """A step in training: the output, its gradient, and the running statistics after it."""
    x = (2 * normal(3, 6, C) + 1).requires_grad_()
    before = [getattr(layer, name).detach().clone() for name in STATISTICS]
    gamma, beta = layer.gamma.detach(), layer.beta.detach()
    y = layer.train()(x)
    right = reference.forward(x, gamma, beta, EPS).y
    by_running = {
        why.NORMALIZED_BY_RUNNING: lambda: reference.inference(x, *before, gamma=gamma, beta=beta, eps=EPS).detach()
    }
    judge("BatchNorm(x)", y.detach(), right.detach(), by_running)
    weights = normal(4, 6, C)
    (found,) = torch.autograd.grad(y, x, weights, retain_graph=True)
    (dx,) = torch.autograd.grad(right, x, weights)
    constant = weights * gamma / (x.detach().var(0, correction=0) + EPS).sqrt()
    judge("dx", found, dx, {why.NORMALIZED_BY_CONSTANTS: lambda: constant})
    after = [getattr(layer, name) for name in STATISTICS]
    if any(each.requires_grad for each in after):
        raise Wrong(tr(why.GRAPH_KEPT))
    _judge_update(before, after, x.detach())


def _judge_update(before: list[Tensor], after: list[Tensor], x: Tensor) -> None:
    mean, unbiased = reference.running(before[0], before[1], x, MOMENTUM)
    _, biased = reference.running(before[0], before[1], x, MOMENTUM, unbiased=False)
    reversed_mean, _ = reference.running(before[0], before[1], x, 1 - MOMENTUM)
    unchanged, reverse = {why.NEVER_UPDATED: lambda: before[0]}, {why.MOMENTUM_REVERSED: lambda: reversed_mean}
    judge("running_mean", after[0], mean, unchanged | reverse)
    if not agree(after[1], biased):  # both conventions pass here; task 6 is about them
        judge("running_var", after[1], unbiased, {why.NEVER_UPDATED: lambda: before[1]})


def _check_evaluation(layer: Any) -> None:
    x = normal(5, 4, C) - 1
    before = [getattr(layer, name).clone() for name in STATISTICS]
    y = layer.eval()(x).detach()
    gamma, beta = layer.gamma.detach(), layer.beta.detach()
    right = reference.inference(x, *before, gamma=gamma, beta=beta, eps=EPS)
    judge("BatchNorm(x)", y, right, {why.EVALUATION_BY_BATCH: lambda: reference.forward(x, gamma, beta, EPS).y})
    if not all(torch.equal(getattr(layer, name), old) for name, old in zip(STATISTICS, before, strict=True)):
        raise Wrong(tr(why.EVALUATION_UPDATES))


def _check_copies(layer: Any, learner: Learner) -> None:
    """A copy and a new layer with its checkpoint compute the same."""
    x = normal(6, 4, C)
    loaded = learner.run("BatchNorm", C, EPS, MOMENTUM).double()
    loaded.load_state_dict(layer.state_dict())
    for each in (copy.deepcopy(layer), loaded.eval()):
        judge("BatchNorm(x)", each(x).detach(), layer(x).detach(), {})


TASK = Task(
    4,
    "buffers",
    marked("a layer: buffers, state_dict, deepcopy"),
    (
        marked(
            "This layer computes the right thing, but its running statistics are plain attributes: a checkpoint lacks them, and they hold "
            "the autograd graph of every batch. Mend it, so that state_dict has running_mean and running_var, deepcopy works after a step, "
            "and the statistics follow .double() and .to()."
        ),
    ),
    ("BatchNorm",),
    (
        marked("What nn.Module saves are parameters and buffers. Which of the two does an optimizer leave alone?"),
        marked(
            "self.register_buffer('running_mean', torch.zeros(num_features)) in __init__; self.running_mean is then used as before."
        ),
        marked("Update under torch.no_grad(), for instance with self.running_mean.lerp_(mean, self.momentum)."),
    ),
    check,
)
