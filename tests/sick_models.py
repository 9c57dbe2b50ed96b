"""For each rule of `diagnose` a model that has the fault, and the same model without it, built or trained for real."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

N, CLASSES = 64, 3


class Patient(NamedTuple):
    """A model and the arguments of `diagnose`."""

    model: nn.Module
    arguments: Mapping[str, Any] = MappingProxyType({})


class Pair(NamedTuple):
    """The model with the fault, its layers, and the healthy twin."""

    sick: Callable[[], Patient]
    layers: tuple[str, ...]
    healthy: Callable[[], Patient]


def images(
    batches: int = 8, samples: int = N, shift: float = 0.0, seed: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise with a bright spot whose place is the class, (N, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(batches):
        y = torch.randint(CLASSES, (samples,), generator=generator)
        x = torch.randn(samples, 3, 8, 8, generator=generator) + shift
        for place in range(CLASSES):
            x[y == place, :, 2 * place : 2 * place + 2] += 2
        items.append((x, y))
    return items


def network(**norm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def train(model: nn.Module, items, steps: int = 40, lr: float = 0.05) -> nn.Module:
    """Train, and settle at a low learning rate, so that the running statistics catch up."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for step in range(2 * steps):
        optimizer.param_groups[0]["lr"] = lr if step < steps else lr / 50
        optimizer.zero_grad()
        x, y = items[step % len(items)]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@cache
def _trained() -> nn.Module:
    return train(network(), images())


def trained() -> nn.Sequential:
    return copy.deepcopy(_trained())


def with_data(model: nn.Module, **arguments) -> Patient:
    return Patient(model, {"loader": images(), **arguments})


def with_loss(model: nn.Module, **arguments) -> Patient:
    return with_data(model, criterion=nn.CrossEntropyLoss(), **arguments)


def changed(change: Callable[[nn.Module], Any]) -> Callable[[], Patient]:
    def build() -> Patient:
        model = trained()
        change(model)
        return Patient(model)

    return build


def healthy() -> Patient:
    return with_loss(trained())


def set_all(**attributes) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for layer in (model[1], model[4]):
            for name, value in attributes.items():
                setattr(layer, name, value)

    return change


def lagging() -> Patient:
    model = trained()
    model[4].running_mean += 2 * model[4].running_var.sqrt()
    return with_loss(model)


def new_affine(model: nn.Module) -> None:
    for layer in (model[1], model[4]):
        layer.reset_running_stats()


def hardly_updated(**norm) -> Patient:
    model = network(**norm)
    for x, _ in images(4):
        model(x)
    return Patient(model)


def with_dropout(place: int) -> Patient:
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)]
    torch.manual_seed(0)
    layers.insert(place, nn.Dropout(0.5))
    model = nn.Sequential(*layers)
    items = [(torch.randn(N, 16), torch.randint(CLASSES, (N,))) for _ in range(8)]
    return Patient(train(model, items), {"loader": items})


def predicted(evaluating: bool) -> Patient:
    model = trained()

    def predict(model, x):
        if evaluating:
            model.eval()
        return model(x)

    return with_data(model, predict=predict)


def half_frozen(*, frozen: bool) -> Patient:
    model = trained()
    for layer in (model[1], model[4]):
        bn.freeze(layer) if frozen else layer.requires_grad_(False)
    return Patient(model)


def validated(evaluating: bool) -> Patient:
    @torch.no_grad()
    def validate(model):
        model.train(not evaluating)
        for x, _ in images(2, seed=5):
            model(x)

    return Patient(trained(), {"validate": validate})


def stepping(model: nn.Module, *, every: int = 1, trains: bool = True) -> Patient:
    optimizer, count = torch.optim.SGD(model.parameters(), 0.01), [0]

    def step(model, item):
        if trains:
            model.train()
        F.cross_entropy(model(item[0]), item[1]).backward()
        count[0] += 1
        if count[0] % every == 0:
            optimizer.step()
            optimizer.zero_grad()

    return with_data(model, step=step)


def woken(trains: bool) -> Patient:
    model = trained()
    model[1].eval()
    return stepping(model, trains=trains)


def pooled(last: int) -> Patient:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    return Patient(model, {"loader": [*images(4), *images(1, last)]})


def flat(samples: int, batches: int = 16) -> Patient:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return Patient(model, {"loader": [torch.randn(samples, 16) for _ in range(batches)]})


def tailed(last: int) -> Patient:
    patient = flat(N, 6)
    patient.arguments["loader"].append(torch.randn(last, 16))
    return patient


def sequences(padded: bool) -> Patient:
    torch.manual_seed(0)
    items = []
    for _ in range(4):
        x = torch.randn(32, 4, 20)
        if padded:
            for sample, length in zip(x, torch.randint(4, 20, (32,)), strict=True):
                sample[:, length:] = 0
        items.append(x)
    return Patient(nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)), {"loader": items})


def sorted_data(shuffled: bool) -> Patient:
    x, y = (torch.cat(values) for values in zip(*images(), strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) if shuffled else y.argsort()
    return Patient(trained(), {"loader": list(zip(x[order].split(N), y[order].split(N), strict=True))})


def telling(offset: float) -> Patient:
    """Only the difference from the batch's mean tells the class: without an offset of the batch, the value itself does too."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(12):
        x = torch.randn(32, 4, generator=generator)
        y = torch.tensor([0, 1]).repeat(16)
        x[:, 0] = 2.0 * y + 0.3 * x[:, 0] + offset * torch.randn((), generator=generator)
        items.append((x, y))
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    return Patient(train(model, items), {"loader": items, "criterion": nn.CrossEntropyLoss()})


def poisoned(model: nn.Module) -> None:
    model[4].running_var[0] = float("nan")


def offset(size: float) -> Patient:
    patient = flat(N, 4)
    items = [x + size for x in patient.arguments["loader"]]
    return Patient(nn.Sequential(nn.BatchNorm1d(16)), {"loader": items})


def overflowing(value: float) -> Patient:
    items = images(4)
    items[2][0][0, 0, 0, 0] = value
    return Patient(trained(), {"loader": items})


def average(*, recalibrated: bool) -> Patient:
    """An average of weights with the buffers of another model."""
    model, early = trained(), train(network(), images(), 10)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value, other in zip(twin.parameters(), early.parameters(), strict=True):
            value.lerp_(other, 0.5)
    if recalibrated:
        bn.recalibrate(twin, images())
    return with_data(model, twin=twin)


def stale_buffers(*, copied: bool) -> Patient:
    model = trained()
    twin = network()
    for value, other in zip(twin.parameters(), model.parameters(), strict=True):
        value.data.copy_(other.data)
    return Patient(model, {"twin": copy.deepcopy(model) if copied else twin})


def port(eps: float) -> Patient:
    twin = trained()
    set_all(eps=eps)(twin)
    return Patient(trained(), {"twin": twin})


def folded(*, broken: bool) -> Patient:
    model = trained().eval()
    twin, _ = bn.fold(model, images(1)[0][0])
    if broken:
        with torch.no_grad():
            twin[3].bias += 0.5
    return with_data(model, twin=twin)


def ranks(*, synchronized: bool) -> Patient:
    model, other = trained(), trained()
    if not synchronized:
        for x, _ in images(20, shift=1.5):
            other(x)
    return Patient(model, {"replicas": [model, other]})


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def stripped(*, ours: bool) -> Patient:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), WithActivation(8))
    return Patient(bn.convert(model) if ours else nn.SyncBatchNorm.convert_sync_batchnorm(model))


def dead(share: int) -> Patient:
    model = network()
    with torch.no_grad():
        model[0].weight[:share] = 0
    return with_data(model)


def biased(bias: bool) -> Patient:
    torch.manual_seed(0)
    return with_data(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)))


class Siamese(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.norm = scale, nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) - self.norm(self.scale * x.flip(0) + self.scale - 1)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), layer), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(checkpoint(self.layers, x, use_reentrant=False).mean((2, 3)))


class ByHand(nn.Module):
    """A batch norm as in tutorials, with the faults that they have."""

    def __init__(
        self,
        channels: int,
        *,
        registered: bool = True,
        branches: bool = True,
        detached: bool = False,
        graph: bool = False,
        biased: bool = False,
        positions: bool = False,
    ):
        super().__init__()
        self.branches, self.detached, self.graph, self.biased, self.positions = (
            branches,
            detached,
            graph,
            biased,
            positions,
        )
        self.eps, self.momentum = 1e-5, 0.1
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        for name, value in (("running_mean", torch.zeros(channels)), ("running_var", torch.ones(channels))):
            self.register_buffer(name, value) if registered else setattr(self, name, value)

    def forward(self, x):
        over = (0,) if self.positions else (0, *range(2, x.dim()))
        if self.training or not self.branches:
            values = x.detach() if self.detached else x
            mean, var = values.mean(over), values.var(over, unbiased=False)
            self.update(mean, var, x.numel() // mean.numel())
        else:
            mean, var = self.running_mean, self.running_var
        gamma, beta = self.gamma, self.beta
        if not self.positions:
            mean, var, gamma, beta = (value.view(-1, *[1] * (x.dim() - 2)) for value in (mean, var, gamma, beta))
        return gamma * (x - mean) / (var + self.eps).sqrt() + beta

    def update(self, mean, var, m):
        if not self.graph:
            mean, var = mean.detach(), var.detach()
        var = var if self.biased else var * m / (m - 1)
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var


def by_hand(samples: int = N, **faults) -> Patient:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), ByHand(16, **faults), nn.ReLU(), nn.Linear(16, CLASSES))
    items = [(torch.randn(samples, 16), torch.randint(CLASSES, (samples,))) for _ in range(8)]
    return Patient(train(model, items), {"loader": items})


def by_hand_on_images(**faults) -> Patient:
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), ByHand(8, **faults), *head)
    return with_loss(train(model, images()))


def optimized(lr: float) -> Patient:
    model = network()
    return with_loss(model, optimizer=torch.optim.SGD(model.parameters(), lr, momentum=0.9))


def decayed(affine: float) -> Patient:
    model = trained()
    own = [value for layer in (model[1], model[4]) for value in layer.parameters()]
    others = [value for value in model.parameters() if all(value is not each for each in own)]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": own, "weight_decay": affine}]
    return Patient(model, {"optimizer": torch.optim.SGD(groups, 0.01)})


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def deep(*, residual: bool) -> Patient:
    torch.manual_seed(0)
    block = Residual if residual else nn.Sequential
    blocks = [block(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(60)]
    model = nn.Sequential(*blocks, nn.Linear(32, CLASSES))
    items = [(torch.randn(N, 32), torch.randint(CLASSES, (N,))) for _ in range(2)]
    return Patient(model, {"loader": items, "criterion": nn.CrossEntropyLoss()})


BOTH = ("1", "4")
GALLERY = {
    "BN101": Pair(changed(set_all(momentum=0.9)), BOTH, healthy),
    "BN102": Pair(changed(set_all(momentum=0.0)), BOTH, healthy),
    "BN103": Pair(changed(set_all(eps=0.5)), BOTH, changed(set_all(eps=1e-3))),
    "BN104": Pair(lambda: Patient(network(track_running_stats=False)), BOTH, healthy),
    "BN201": Pair(lagging, ("4",), healthy),
    "BN202": Pair(hardly_updated, BOTH, lambda: hardly_updated(momentum=None)),
    "BN203": Pair(changed(new_affine), BOTH, lambda: Patient(network())),
    "BN204": Pair(lambda: with_dropout(2), ("4",), lambda: with_dropout(5)),
    "BN301": Pair(lambda: predicted(False), BOTH, lambda: predicted(True)),
    "BN302": Pair(lambda: half_frozen(frozen=False), BOTH, lambda: half_frozen(frozen=True)),
    "BN303": Pair(lambda: validated(False), BOTH, lambda: validated(True)),
    "BN304": Pair(lambda: woken(True), ("1",), lambda: woken(False)),
    "BN401": Pair(lambda: pooled(1), ("3",), lambda: pooled(N)),
    "BN402": Pair(lambda: flat(3), ("1",), lambda: flat(N)),
    "BN403": Pair(lambda: tailed(2), ("1",), lambda: tailed(N // 2 + 1)),
    "BN404": Pair(lambda: sequences(True), ("0",), lambda: sequences(False)),
    "BN405": Pair(lambda: sorted_data(False), BOTH, lambda: sorted_data(True)),
    "BN406": Pair(lambda: telling(3.0), ("0",), lambda: telling(0.0)),
    "BN407": Pair(lambda: stepping(trained(), every=4), BOTH, lambda: stepping(trained())),
    "BN501": Pair(changed(poisoned), ("4",), healthy),
    "BN502": Pair(changed(lambda model: model.half()), BOTH, changed(lambda model: bn.convert(model).half())),
    "BN503": Pair(lambda: offset(1e7), ("0",), lambda: offset(10)),
    "BN504": Pair(lambda: overflowing(float("inf")), ("1",), lambda: overflowing(3)),
    "BN601": Pair(lambda: average(recalibrated=False), BOTH, lambda: average(recalibrated=True)),
    "BN602": Pair(lambda: port(1e-3), BOTH, lambda: port(1e-5)),
    "BN603": Pair(lambda: folded(broken=True), BOTH, lambda: folded(broken=False)),
    "BN611": Pair(lambda: ranks(synchronized=False), ("1",), lambda: ranks(synchronized=True)),
    "BN701": Pair(lambda: stripped(ours=False), ("1",), lambda: stripped(ours=True)),
    "BN702": Pair(lambda: dead(6), ("1",), lambda: dead(1)),
    "BN703": Pair(lambda: biased(True), ("1",), lambda: biased(False)),
    "BN704": Pair(lambda: with_data(Siamese(4.0)), ("norm",), lambda: with_data(Siamese(1.0))),
    "BN705": Pair(
        lambda: with_loss(Checkpointed(nn.BatchNorm2d(4))),
        ("layers.1",),
        lambda: with_loss(Checkpointed(bn.BatchNorm2d(4))),
    ),
    "BN711": Pair(lambda: by_hand(registered=False), ("1",), by_hand),
    "BN712": Pair(lambda: by_hand(branches=False), ("1",), by_hand),
    "BN713": Pair(lambda: by_hand(detached=True), ("1",), by_hand),
    "BN714": Pair(lambda: by_hand(graph=True), ("1",), by_hand),
    "BN715": Pair(lambda: by_hand_on_images(positions=True), ("1",), by_hand_on_images),
    "BN716": Pair(lambda: by_hand(biased=True), ("1",), by_hand),
    "BN801": Pair(lambda: optimized(2.0), BOTH, lambda: optimized(0.01)),
    "BN802": Pair(lambda: decayed(1e-4), BOTH, lambda: decayed(0.0)),
    "BN803": Pair(lambda: deep(residual=False), ("0.1",), lambda: deep(residual=True)),
}
