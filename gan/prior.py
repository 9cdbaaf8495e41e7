"""Fitting model.CodePrior, a mixture of normal distributions, to the codes of healthy slices."""

from __future__ import annotations

import torch

from model import CodePrior

LEADING = 24                 # principal components in which the codes are grouped
SHRINK = 400                 # codes that a component's covariance needs to count half against the shared one
FEWEST = 50                  # codes of a component


@torch.no_grad()
def fit(prior: CodePrior, codes: torch.Tensor, variances: torch.Tensor, seed: int = 0) -> None:
    """To codes [M, D] and their own variances [M, D]. Components that would be left with a few get no share."""
    own, labels = codes.double(), group(codes.double(), len(prior.share), seed)
    centres = torch.stack([own[labels == k].mean(0) if (labels == k).any() else own.mean(0)
                           for k in range(len(prior.share))])
    shared = torch.cov((own - centres[labels]).T)
    blur = torch.diag(variances.double().mean(0) + 1e-5)
    for k in range(len(prior.share)):
        mine = own[labels == k]
        weight = len(mine) / (len(mine) + SHRINK)
        covariance = weight * torch.cov(mine.T) + (1 - weight) * shared if len(mine) > 1 else shared
        prior.share[k] = len(mine) if len(mine) >= FEWEST else 0
        prior.mean[k] = centres[k]
        prior.factor[k] = torch.linalg.cholesky(covariance + blur)
    if not prior.share.any():
        prior.share[0], prior.mean[0] = 1, own.mean(0)
        prior.factor[0] = torch.linalg.cholesky(torch.cov(own.T) + blur)
    prior.share /= prior.share.sum()


def group(codes: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Labels [M] of `count` groups of codes [M, D]: k-means in their leading principal components."""
    rng = torch.Generator().manual_seed(seed)
    centred = codes - codes.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    leading = centred @ vectors[:, -LEADING:]
    centres = leading[torch.randperm(len(codes), generator=rng)[:count]]
    for _ in range(30):
        labels = torch.cdist(leading, centres).argmin(1)
        centres = torch.stack([leading[labels == k].mean(0) if (labels == k).any() else centres[k]
                               for k in range(len(centres))])
    return torch.cdist(leading, centres).argmin(1)
