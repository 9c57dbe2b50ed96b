"""Task 10: a model with three faults."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.language import marked, tr
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Wrong, agree
from batchnorm.learn.exercises.task import Task

SAMPLES, FEATURES, CLASSES = 33, 8, 3  # 33 = 4 · 8 + 1
DEAD = 1e-5  # of the weight's gradient


def check(learner: Learner) -> None:
    """A training whose last batch has one sample, predictions, a training after them, and every bias's gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, FEATURES), torch.arange(SAMPLES) % CLASSES
    model = learner.run("Model")
    if not isinstance(model, nn.Module):
        raise Wrong(tr("{name} must be a class derived from nn.Module", name="Model"))
    if not _norms(model):
        raise Wrong(tr(why.NORM_REMOVED))
    _check_training(learner, model, x, y)
    _check_prediction(learner, model, x)
    _check_training(learner, model, x, y)
    _check_biases(learner, model, x, y)


def _check_training(learner: Learner, model: Any, x: Tensor, y: Tensor) -> None:
    before, weights = _statistics(model), _copies(model.parameters())
    try:
        learner.run("train", model, x, y)
    except Wrong as wrong:
        if "Expected more than 1 value per channel" in str(wrong):
            raise Wrong(tr(why.BATCH_OF_ONE)) from wrong
        raise
    if _equal(before, _statistics(model)):
        raise Wrong(tr(why.TRAIN_FORGOTTEN))
    if _equal(weights, _copies(model.parameters())):
        raise Wrong(tr("{name} changes no parameter", name="train"))


def _check_prediction(learner: Learner, model: Any, x: Tensor) -> None:
    before = _statistics(model)
    (together,) = learner.call("predict", (model.train(), x), (SAMPLES, CLASSES))
    (alone,) = learner.call("predict", (model.train(), x[:2]), (2, CLASSES))
    if not _equal(before, _statistics(model)) or not agree(alone, together[:2], close=1e-4):
        raise Wrong(tr(why.EVAL_FORGOTTEN))


def _check_biases(learner: Learner, model: Any, x: Tensor, y: Tensor) -> None:
    """A bias in front of a batch norm has no gradient."""
    model.train().zero_grad()
    with learner.running():
        nn.functional.cross_entropy(model(x), y).backward()
    for name, layer in model.named_modules():
        bias, weight = getattr(layer, "bias", None), getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear) and bias is not None and weight is not None:
            gradients = [torch.zeros(1) if each.grad is None else each.grad for each in (bias, weight)]
            if gradients[0].abs().max() <= DEAD * gradients[1].abs().max():
                raise Wrong(tr(why.DEAD_BIAS, name=name))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def _statistics(model: nn.Module) -> list[Tensor]:
    return _copies(buffer for layer in _norms(model) for buffer in layer.buffers())


def _copies(tensors: Any) -> list[Tensor]:
    return [each.detach().clone() for each in tensors]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


TASK = Task(
    10,
    "repair",
    marked("repair a model"),
    (
        marked(
            "Three things are wrong here: the last batch of the training may have a single sample; a bias is learned that has no effect; "
            "and predictions depend on the other samples of the batch. Mend them, and keep the batch norm. train(model, x, y) trains over "
            "all batches once, also after a prediction; predict(model, x) returns a row of scores for every sample."
        ),
    ),
    ("Model", "train", "predict"),
    (
        marked(
            "What is the variance of one sample? What is left of a constant after its mean is subtracted? What does eval() change?"
        ),
        marked(
            "nn.Linear(8, 16, bias=False) before the batch norm; model.eval() in predict, and model.train() in train."
        ),
        marked("In train: `if len(inputs) > 1`, or a DataLoader with drop_last=True."),
    ),
    check,
)
