"""Training losses. Functions take tensors and return scalars; none touches an optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------
# Adversarial training (Goodfellow et al. 2014; Mescheder et al. 2018; Karras et al. 2020, section 3.2)


def g_nonsaturating(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(G(z))), mean over the batch."""
    return F.softplus(-fake_logits).mean()


def d_logistic(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))), mean over the batch."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, real_images: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of |grad_x D(x)|^2. real_images must require grad. The caller multiplies by gamma / 2."""
    (grad,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def path_lengths(images: torch.Tensor, w_plus: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """|J_w^T y| of each sample (Karras et al. 2020, eq. 4): [B]. noise: standard normal, images' shape.

    As in the reference implementations: y is scaled by 1 / sqrt(H W) and the squares are averaged over the layers.
    """
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * y).sum(), w_plus, create_graph=True)
    return grad.square().sum(2).mean(1).sqrt()


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """No gradients for a network's parameters inside the block: its backward pass then skips them."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------
# Inversion


def in_domain(code: torch.Tensor, code_of_reconstruction: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between the code of an image and the code of its reconstruction (Zhu et al. 2020)."""
    return F.mse_loss(code_of_reconstruction, code)
