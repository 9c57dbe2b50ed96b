"""Keys of a contrastive loss: what batch statistics tell about the replica of a key, and that shuffling takes it away.

Images are coins, 0 or 1, so a key alone says nothing about the query that it belongs to. Two groups of `Ghost` stand for two replicas.
"""

import torch

import batchnorm as bn

REPLICAS, IMAGES = 2, 32


def encode(images: torch.Tensor) -> torch.Tensor:
    """(N, 1): normalized on each replica by its own statistics."""
    return bn.BatchNorm1d(1, affine=False, statistics=bn.statistics.Ghost(IMAGES))(images)


def share_of_heads(encoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """What one normalized coin says about its batch: with a share p of heads, z² is (1-p)/p for heads and p/(1-p) for tails."""
    square = encoded.square()
    return torch.where(images > 0.5, 1 / (1 + square), square / (1 + square))


def guessed(queries: torch.Tensor, keys: torch.Tensor, images: torch.Tensor) -> float:
    """How often the replica whose queries have the share of heads that a key shows is the replica of this key."""
    shares = share_of_heads(queries, images).view(REPLICAS, IMAGES).mean(1)
    found = (share_of_heads(keys, images) - shares).abs().argmin(1)
    return (found == torch.arange(REPLICAS).repeat_interleave(IMAGES)).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    apart, shuffled = 0.0, 0.0
    batches = [images for images in torch.randint(2, (400, REPLICAS * IMAGES, 1)).float() if differ(images)]
    for images in batches:
        queries = encode(images)
        apart += guessed(queries, encode(images), images) / len(batches)
        shuffled += guessed(queries, bn.shuffled(encode, images), images) / len(batches)
    print(f"the replica of a key, guessed from its value: {apart:.0%} right, shuffled: {shuffled:.0%} right")


def differ(images: torch.Tensor) -> bool:
    """Whether the replicas have different shares of heads."""
    first, second = images.view(REPLICAS, IMAGES).sum(1)
    return bool(first != second)


if __name__ == "__main__":
    main()
