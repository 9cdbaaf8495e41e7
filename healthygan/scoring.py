"""Scores: the difference between an image and its healthy version, of images and of scans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from evaluation import metrics
from healthygan.data import Pictures
from healthygan.model import Generator


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x - y| / 2, the mean over channels: [B, H, W] in [0, 1]. Its mean over pixels is the image's score."""
    return ((x - y).abs() / 2).mean(1)


@torch.no_grad()
def image_scores(generator: Generator, pictures: Pictures, device: torch.device, batch: int = 16) -> np.ndarray:
    """One score an image, float64 [n] in [0, 1]."""
    parts = []
    for indices in np.array_split(np.arange(len(pictures)), -(-len(pictures) // batch)):
        x = pictures[indices].to(device)
        parts.append(difference(x, generator(x).y).double().mean((1, 2)).cpu())
    return torch.cat(parts).numpy()


def unit_scores(scores: Sequence[float], units: Sequence[str]) -> dict[str, float]:
    """The mean of each unit's image scores, in order of first appearance: a scan's score."""
    grouped: dict[str, list[float]] = {}
    for score, unit in zip(scores, units):
        grouped.setdefault(unit, []).append(score)
    return {unit: float(np.mean(own)) for unit, own in grouped.items()}


def aucp(mixed_scores: np.ndarray, healthy_scores: np.ndarray) -> float:
    """AUC that takes the unannotated images as abnormal and the known-healthy as normal: needs no labels.

    With a share p of diseased images among the unannotated, the best attainable is about (1 + p) / 2.
    """
    labels = np.repeat([1, 0], [len(mixed_scores), len(healthy_scores)])
    return metrics.auc(np.concatenate([mixed_scores, healthy_scores]), labels)
