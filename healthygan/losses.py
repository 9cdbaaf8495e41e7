"""HealthyGAN's losses (Rahman Siddiquee et al. 2022, section 2). Tensors in, scalars out; no labels anywhere.

A is the unannotated set (healthy and diseased), B is known to be healthy; a and b are batches of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from healthygan.model import Translation

PENALTY_WEIGHT = 10.0
IDENTITY_WEIGHT = 1.0
RECONSTRUCTION_WEIGHT = 1.0
MASK_WEIGHT = 0.1
FOCUS_CENTRE, FOCUS_EPSILON = 0.5, 0.01


def wasserstein(real_values: torch.Tensor, fake_values: torch.Tensor) -> torch.Tensor:
    """mean D(b) - mean D(y_a): the critic's estimate of the distance between the two, which it raises."""
    return real_values.mean() - fake_values.mean()


def gradient_penalty(critic: Callable, b: torch.Tensor, y_a: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Mean of (|grad D| - 1)^2 at share b + (1 - share) y_a, for the SUM of D's values (Gulrajani et al. 2017).

    b, y_a [B, 3, H, W]; share [B, 1, 1, 1] in [0, 1]. The norm is taken in float32 whatever the critic computes in.
    """
    mix = torch.lerp(y_a.detach(), b, share).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(mix).sum(), mix, create_graph=True)
    return (gradient.square().sum((1, 2, 3)).sqrt() - 1).square().mean()


def identity(b: torch.Tensor, of_b: Translation) -> torch.Tensor:
    """mean |b - t_b|: a healthy image must come through the network, not only past its mask."""
    return (b - of_b.t).abs().mean()


def reconstruction(a: torch.Tensor, of_a: Translation) -> torch.Tensor:
    """mean |a - (m a + (1 - m) t)|: outside the mask the raw translation is the image."""
    return (a - (of_a.m * a + (1 - of_a.m) * of_a.t)).abs().mean()


def focus(m: torch.Tensor, indecision: float = 1.0) -> torch.Tensor:
    """(mean m)^2 + indecision (mean 1 / (|m - 0.5| + 0.01) - 1 / 0.51): a mask small and decided. m [B, 1, H, W].

    With indecision 1, as published, no pixel of the mask can cross 0.5 any more once the term weighs: it adds up to
    100 there. With 0 the mask stays free to follow where the translation differs from the image.
    """
    undecided = 1 / ((m - FOCUS_CENTRE).abs() + FOCUS_EPSILON)
    return m.mean().square() + indecision * (undecided.mean() - 1 / (FOCUS_CENTRE + FOCUS_EPSILON))
