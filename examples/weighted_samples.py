"""Graphs of different sizes in one batch: with weights each graph counts once, instead of each node."""

import torch

import batchnorm as bn

torch.manual_seed(0)
sizes = torch.tensor([400, 30, 25, 20, 25])  # nodes of each graph
graph = torch.repeat_interleave(torch.arange(5), sizes)  # (nodes,)
centers = torch.tensor([4.0, 0.0, 1.0, -1.0, 0.0])
nodes = torch.randn(len(graph), 8) + centers[graph].unsqueeze(1)  # (nodes, C)
weights = len(graph) / len(sizes) / sizes[graph]  # all graphs alike, and as many samples as there are nodes

for name, given in (("each node counts once: ", None), ("each graph counts once:", weights)):
    y = bn.BatchNorm1d(8)(nodes, weights=given)
    means = [part.mean().item() for part in y.split(sizes.tolist())]
    print(name, "the graphs lie at", *(f"{mean:+.1f}" for mean in means), f"on average at {sum(means) / 5:+.2f}")
