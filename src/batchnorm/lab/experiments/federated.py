"""Ten clients train one network on data that none of them shares; what becomes of their running statistics.

Federated averaging (McMahan et al. 2017): in each round every client starts from the server's network, trains on its own images, and the
server averages the parameters by numbers of images. The arms differ in the batch norms only. There are two kinds of clients: each with
images of few classes (`labels`), and each with images of all classes from a scanner of its own contrast and brightness (`features`).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from batchnorm.federated import local_keys, merge_statistics
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.experiment import AVX2, Experiment, Measured, Metric, Setting
from batchnorm.lab.networks import perceptron
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import Schedule, accuracy, train
from batchnorm.layers import BatchNorm1d
from batchnorm.population import recalibrate

CLIENTS, SHARDS = 10, 2  # each client has so many shards of the images sorted by class (McMahan et al. 2017, section 3)
BATCH, STEPS = 16, 14  # of each client in a round, about two passes over its images

State = dict[str, Tensor]


@dataclass(frozen=True)
class Client:
    """The images that one client trains on, and images to test of the same distribution."""

    train: Examples
    test: Examples


def by_labels(train: Examples, test: Examples, generator: torch.Generator) -> list[Client]:
    """Clients with two shards of the sorted images each, so mostly of two or three classes."""
    order, dealt = train.labels.argsort(stable=True), torch.randperm(SHARDS * CLIENTS, generator=generator)
    shards = order.tensor_split(SHARDS * CLIENTS)
    clients = list[Client]()
    for own in dealt.split(SHARDS):
        mine = train[torch.cat([shards[i] for i in own.tolist()])]
        clients.append(Client(mine, test[torch.isin(test.labels, mine.labels.unique())]))
    return clients


def by_features(train: Examples, test: Examples, generator: torch.Generator) -> list[Client]:
    """Clients with random images, seen at a contrast of 1/4 to 4 and a brightness of -2 to 2 deviations."""
    parts = torch.randperm(len(train), generator=generator).tensor_split(CLIENTS)
    contrasts = torch.logspace(-2, 2, CLIENTS, base=2)[torch.randperm(CLIENTS, generator=generator)].tolist()
    brightness = torch.linspace(-2, 2, CLIENTS)[torch.randperm(CLIENTS, generator=generator)].tolist()

    def seen(examples: Examples, i: int) -> Examples:
        return replace(examples, images=contrasts[i] * examples.images + brightness[i])

    return [Client(seen(train[part], i), seen(test, i)) for i, part in enumerate(parts)]


KINDS = {"labels": by_labels, "features": by_features}


def _averaged(states: Sequence[State], shares: Sequence[float]) -> State:
    """The weighted average of each tensor; counters are rounded down."""
    return {
        key: sum(share * state[key].double() for share, state in zip(shares, states, strict=True)).to(value.dtype)  # pyright: ignore
        for key, value in states[0].items()
    }


def _round(arm: str, server: nn.Module, networks: Sequence[nn.Module], clients: Sequence[Client], seed: int) -> None:
    """Every client trains, then the server averages."""
    local = {"parameters": local_keys(server, affine=False), "fedbn": local_keys(server)}.get(arm, ())
    for i, (network, client) in enumerate(zip(networks, clients, strict=True)):
        network.load_state_dict({k: v for k, v in server.state_dict().items() if k not in local}, strict=False)
        for _ in train(network, client.train, Schedule(0.05, STEPS, BATCH, CLIENTS * seed + i, momentum=0.9)):
            pass
    counts = [len(client.train) for client in clients]
    states = [network.state_dict() for network in networks]
    average = _averaged(states, [count / sum(counts) for count in counts])
    if arm in ("merged", "recalibrated"):
        average |= merge_statistics(states, counts)
    server.load_state_dict({k: v for k, v in average.items() if k not in local}, strict=False)


def _recalibrated(server: nn.Module, clients: Sequence[Client]) -> None:
    """One more exchange: each client counts its images through the server's network, and the server merges."""
    states = [recalibrate(copy.deepcopy(server), client.train.images.split(BATCH)).state_dict() for client in clients]
    server.load_state_dict(merge_statistics(states, [len(client.train) for client in clients]), strict=False)


def trained(arm: str, kind: str, rounds: int, setting: Setting) -> tuple[float, float]:
    """Test accuracy of the server's network, and that of each client's on images as it has them; both as means over the clients."""
    data = digits.load(size=8).to(setting.device)
    clients = KINDS[kind](data.train, data.test, torch.Generator().manual_seed(setting.seed))
    torch.manual_seed(setting.seed)
    server = perceptron((64, 128, 64, 10), BatchNorm1d).to(setting.device)
    networks = [copy.deepcopy(server) for _ in clients]
    for number in range(rounds):
        _round(arm, server, networks, clients, rounds * setting.seed + number)
    if arm == "recalibrated":
        _recalibrated(server, clients)
    local = {"parameters": local_keys(server, affine=False), "fedbn": local_keys(server)}.get(arm, ())
    of_clients = list[float]()
    for network, client in zip(networks, clients, strict=True):
        network.load_state_dict({k: v for k, v in server.state_dict().items() if k not in local}, strict=False)
        of_clients.append(accuracy(network, client.test))
    everything = [data.test] if kind == "labels" else [client.test for client in clients]
    of_server = math.nan if arm == "fedbn" else sum(accuracy(server, test) for test in everything) / len(everything)
    return of_server, sum(of_clients) / len(of_clients)


def measure(arm: str, setting: Setting) -> Measured:
    rounds = setting.pick(5, 20, 50)
    values = dict[str, float]()
    for kind in KINDS:
        values[f"{kind}_server"], values[f"{kind}_clients"] = trained(arm, kind, rounds, setting)
    return Measured(values)


ARMS = {
    "parameters": "parameters only",
    "averaged": "variances averaged",
    "merged": "merged",
    "recalibrated": "recalibrated, then merged",
    "fedbn": "FedBN",
}
METRICS = {
    "labels_server": Metric("few classes each: accuracy of the server's network", ".1%"),
    "labels_clients": Metric("few classes each: on the client's own classes", ".1%"),
    "features_server": Metric("own scanner each: accuracy of the server's network", ".1%"),
    "features_clients": Metric("own scanner each: on the client's own images", ".1%"),
}
RULES = Rules(ARMS, METRICS)
EXPERIMENT = Experiment(
    name="federated",
    question="What should clients of federated learning do with their running statistics?",
    kind="remedy",
    claims={
        "With few classes on each client, the server's network is more accurate with merged statistics than with none of the clients'.": (
            RULES.better("labels_server", "merged", "parameters")
        ),
        "With few classes on each client, merging is more accurate than averaging the variances.": RULES.better(
            "labels_server", "merged", "averaged"
        ),
        "With few classes on each client, recalibrating before merging is more accurate than merging running statistics.": RULES.better(
            "labels_server", "recalibrated", "merged"
        ),
        "With a scanner of its own, each client is more accurate with batch norms of its own (FedBN) than with merged ones.": RULES.better(
            "features_clients", "fedbn", "merged"
        ),
        "With a scanner of its own, each client gains by a weight and bias of its own beside its own statistics.": RULES.better(
            "features_clients", "fedbn", "parameters"
        ),
    },
    source="Li et al. 2021, section 5 (FedBN, arXiv:2102.07623); Andreux et al. 2020 (SiloBN, arXiv:2008.07424)",
    paper="",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    protocol=(
        "A 64-128-64-10 network with batch norms on digits of 8x8 pixels, 10 clients of about 120 images; 20 rounds (quick: 5, full: 50) "
        "of 14 steps of 16 images at each client, SGD with momentum 0.9 at 0.05. Few classes: two of 20 shards of the sorted images for "
        "each client. Scanners: a contrast of 1/4 to 4 and a brightness of -2 to 2 deviations. A client's accuracy is of the network that "
        "it uses, on all test images of its classes, or as its scanner sees them. Nothing is chosen."
    ),
    seconds=25,
    timed_on=AVX2,
)
