"""The Fréchet distance between two sets of features."""

import torch
from torch import Tensor

from batchnorm.errors import InputError


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """
    The squared Fréchet distance of the normal distributions fitted to two sets of features, (N, C) and (M, C), in float64.

    |mean - mean'|² + trace(S + S' - 2 (S S')^(1/2)), with covariances S and S' over N - 1 and M - 1 (Heusel et al. 2017,
    arXiv:1706.08500, section 2). With few examples the distance is too large: compare only sets of equal sizes.

    Raises:
        InputError: fewer than two examples, or different numbers of features.
    """
    if ours.dim() != 2 or theirs.dim() != 2 or ours.shape[1] != theirs.shape[1] or min(len(ours), len(theirs)) < 2:
        raise InputError(
            "features must be (N, C) and (M, C), N and M at least 2, "
            f"but are {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
    ours, theirs = ours.double(), theirs.double()
    covariance, other = ours.T.cov(), theirs.T.cov()
    if ours.shape[1] == 1:
        covariance, other = covariance.reshape(1, 1), other.reshape(1, 1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of S S' are those of the symmetric S^(1/2) S' S^(1/2).
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((ours.mean(0) - theirs.mean(0)).square().sum() + covariance.trace() + other.trace() - 2 * cross)
