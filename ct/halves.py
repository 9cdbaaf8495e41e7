"""Slices at half their size and back, with bone apart: what shares a pixel with bone is no brighter for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def halved(hu: torch.Tensor, bone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices float32 [S, N, N], HU, with bone, bool, N even -> the same [S, N / 2, N / 2].

    A pixel is the mean of four, of those that are no bone where there are any; else it is bone, and the mean of all.
    """
    soft = (~bone).to(hu)
    weight = F.avg_pool2d(soft, 2)
    small_bone = weight == 0
    mean = F.avg_pool2d(hu * soft, 2) / weight.clamp(min=0.25)
    return torch.where(small_bone, F.avg_pool2d(hu, 2), mean), small_bone


def doubled(hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
    """Slices [S, N, N], HU, with bone, bool -> [S, 2 N, 2 N], between pixels linear. No bone shines into its rim."""
    soft = (~bone).to(hu)
    total, weight = (F.interpolate(x[:, None], scale_factor=2, mode="bilinear")[:, 0] for x in (hu * soft, soft))
    return torch.where(weight > 0, total / weight.clamp(min=1e-3), F.interpolate(hu[:, None], scale_factor=2)[:, 0])
