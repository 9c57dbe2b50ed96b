"""Four sites train one network without sharing data: merged statistics for the server, batch norms of their own for the sites (FedBN)."""

import copy

import torch
from torch import Tensor, nn

import batchnorm as bn

torch.manual_seed(0)
SITES, ROUNDS = 4, 10


def data(site: int, samples: int = 200) -> tuple[Tensor, Tensor]:
    """Two classes, measured with the scale and the offset of the site."""
    x = torch.randn(samples, 8)
    return x * 2.0 ** (site - 2) + 3 * site, (x[:, 0] * x[:, 1] > 0).long()


def trained(keep: tuple[str, ...]) -> tuple[nn.Sequential, list[nn.Sequential]]:
    """Networks of all sites, and the server's, where each site keeps some of the entries of its state_dict."""
    torch.manual_seed(1)
    server = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    sites, sets = [copy.deepcopy(server) for _ in range(SITES)], [data(site) for site in range(SITES)]
    for _ in range(ROUNDS):
        for network, (x, y) in zip(sites, sets, strict=True):
            network.load_state_dict({k: v for k, v in server.state_dict().items() if k not in keep}, strict=False)
            optimizer = torch.optim.SGD(network.train().parameters(), lr=0.1, momentum=0.9)
            for part in torch.randperm(len(x)).split(20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x[part]), y[part]).backward()
                optimizer.step()
        states = [network.state_dict() for network in sites]
        average = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
        server.load_state_dict(average | bn.merge_statistics(states, [len(x) for x, _ in sets]))
    return server, sites


def accuracy(networks: list[nn.Sequential]) -> Tensor:
    shares = []
    for site, network in enumerate(networks):
        x, y = data(site, 2000)
        shares.append((network.eval()(x).argmax(1) == y).float().mean())
    return torch.stack(shares).mean()


server, _ = trained(keep=())
_, sites = trained(keep=bn.local_keys(server))
print(f"one network, merged statistics: accuracy {accuracy([server] * SITES):.2f}")
print(f"batch norms of their own:       accuracy {accuracy(sites):.2f}")
