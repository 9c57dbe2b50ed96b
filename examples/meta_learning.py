"""MAML on tasks of three digits, with four ways to normalize the queries; the test tasks have digits that the training tasks lack."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.lab.data import digits
from batchnorm.statistics import Batch, Domains, Statistics, TaskNorm

WAYS, SHOTS, QUERIES, STEPS = 3, 3, 10, 2
data = digits.load(size=8).train


def task(classes: range) -> tuple[Tensor, Tensor]:
    """Images of the support set, (WAYS · SHOTS, 1, 8, 8), and of the queries, class after class."""
    chosen = [torch.nonzero(data.labels == classes[i]).flatten() for i in torch.randperm(len(classes))[:WAYS].tolist()]
    parts = torch.stack([each[torch.randperm(len(each))[: SHOTS + QUERIES]] for each in chosen])
    return data.images[parts[:, :SHOTS].flatten()], data.images[parts[:, SHOTS:].flatten()]


def predict(model: nn.Module, support: Tensor, batches: list[Tensor], buffers: dict[str, Tensor], mode: bool) -> Tensor:
    """Learn the task in an inner loop of STEPS steps, then predict batches of queries with the batch norms in this mode."""
    weights, episode, labels = dict(model.named_parameters()), bn.Episode(), torch.arange(WAYS)
    for step in range(STEPS):
        with bn.domain(step), episode.support():  # each for the layers that use it
            loss = cross_entropy(functional_call(model, weights | buffers, support), labels.repeat_interleave(SHOTS))
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        weights = {name: weights[name] - 0.4 * grad for name, grad in zip(weights, grads, strict=True)}
    with bn.domain(STEPS - 1), episode.support():
        functional_call(model, weights | buffers, support)
    with bn.domain(STEPS - 1), episode.query(), bn.training_mode(model, mode):
        return torch.cat([functional_call(model, weights | buffers, batch) for batch in batches])


def run(name: str, source: Statistics, mode: bool = False) -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3)]
    model = nn.Sequential(*blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, WAYS))
    optimizer = torch.optim.Adam(bn.convert(model, statistics=source).parameters(), 0.01)
    answers, hits = torch.arange(WAYS).repeat_interleave(QUERIES), torch.zeros(2)
    for index in range(75):
        support, queries = task(range(6) if index < 50 else range(6, 10))
        if index < 50:
            optimizer.zero_grad()
            cross_entropy(predict(model, support, [queries], {}, mode), answers).backward()
            optimizer.step()
        else:  # the same queries in one batch, then in a batch for each class; no task updates the model's buffers
            own, batches = {key: value.clone() for key, value in model.named_buffers()}, queries.split(QUERIES)
            outputs = predict(model, support, [queries, *batches], own, mode).unflatten(0, (2, -1))
            hits += (outputs.argmax(2) == answers).float().mean(1) / 25
    print(f"{name}: accuracy {hits[0]:.2f}, class by class {hits[1]:.2f}")


run("running statistics", Batch())
run("those of each step", Domains(range(STEPS), affine=True))
run("queries' own", Batch(), mode=True)
run("TaskNorm", TaskNorm())
