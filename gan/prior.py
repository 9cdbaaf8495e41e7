"""What codes look like: a mixture of normal distributions over the codes of healthy slices, to draw new ones from.

Fitted after the fact, as for a regularised autoencoder (Ghosh et al. 2020, ICLR, arXiv:1903.12436): the codes of a
training's slices are nowhere near the standard normal distribution, and a generator that draws from that one leaves
what it has learnt from slices behind.
"""

from __future__ import annotations

import torch
from torch import nn

COMPONENTS = 6               # a head's levels, about
LEADING = 24                 # principal components in which the codes are grouped
SHRINK = 400                 # codes that a component's covariance needs to count half against the shared one
FEWEST = 50                  # codes of a component


class CodePrior(nn.Module):
    """share [K], mean [K, D] and factor [K, D, D], the Cholesky factor of its covariance, of K normal distributions."""

    def __init__(self, components: int, numbers: int):
        super().__init__()
        self.register_buffer("share", torch.full((components,), 1 / components))
        self.register_buffer("mean", torch.zeros(components, numbers))
        self.register_buffer("factor", torch.eye(numbers).repeat(components, 1, 1))

    @torch.no_grad()
    def fit(self, codes: torch.Tensor, variances: torch.Tensor, seed: int = 0) -> None:
        """From codes [M, D] and their own variances [M, D]. Components that would be left with a few get no share."""
        own = codes.double()
        labels = group(own, len(self.share), seed)
        centres = torch.stack([own[labels == k].mean(0) if (labels == k).any() else own.mean(0)
                               for k in range(len(self.share))])
        shared = torch.cov((own - centres[labels]).T)
        blur = torch.diag(variances.double().mean(0) + 1e-5)
        for k in range(len(self.share)):
            mine = own[labels == k]
            weight = len(mine) / (len(mine) + SHRINK)
            covariance = weight * torch.cov(mine.T) + (1 - weight) * shared if len(mine) > 1 else shared
            self.share[k] = len(mine) if len(mine) >= FEWEST else 0
            self.mean[k] = centres[k]
            self.factor[k] = torch.linalg.cholesky(covariance + blur)
        if not self.share.any():
            self.share[0], self.mean[0] = 1, own.mean(0)
            self.factor[0] = torch.linalg.cholesky(torch.cov(own.T) + blur)
        self.share /= self.share.sum()

    @torch.no_grad()
    def draw(self, count: int, rng: torch.Generator, psi: float = 1.0) -> torch.Tensor:
        """New codes [count, D], on the CPU; psi below 1 draws them towards the middle of their component."""
        which = torch.multinomial(self.share.cpu(), count, replacement=True, generator=rng)
        deviates = psi * torch.randn(count, self.mean.shape[1], 1, generator=rng)
        return self.mean.cpu()[which] + (self.factor.cpu()[which] @ deviates)[..., 0]


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
